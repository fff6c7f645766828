"""`lamina COMMAND …`: maps a command to the part that has it, which is imported only then."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence

from lamina import __version__
from lamina.protos.errors import LaminaError, nearest

# What these say at import is about kernels that are not used here.
for _library in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(_library).setLevel(logging.ERROR)

COMMANDS = {
    "simulate": ("lamina.simulations.cli", "federated fine-tuning on this machine"),
    "coordinator": ("lamina.server.commands.coordinator", "the server of a deployment"),
    "client": ("lamina.client.commands.agent", "a site's agent"),
    "pki": ("lamina.server.commands.pki", "certificates: init, invite, enroll, sign, listen, revoke, renew, list"),
    "status": ("lamina.server.commands.operate", "where a running coordinator stands"),
    "watch": ("lamina.server.commands.operate", "follow a running coordinator"),
    "pause": ("lamina.server.commands.operate", "open no further round, or go on"),
    "stop": ("lamina.server.commands.operate", "end a run early, with its results"),
    "fetch": ("lamina.server.commands.operate", "fetch a run's files from its coordinator"),
    "log": ("lamina.server.commands.log", "check and list a run's tamper-evident event log"),
    "doctor": ("lamina.client.commands.doctor", "check install, devices, certificates, clock, ports"),
    "audit": ("lamina.audits.cli", "what each party could learn from a run, and whether its epsilon holds"),
    "report": ("lamina.server.commands.report", "one HTML page comparing finished runs"),
    "export": ("lamina.client.commands.export", "a run's adapter with its model card; on request a merged model"),
    "plan": ("lamina.client.commands.plan", "this machine, and how it would train a model"),
    "quantise": ("lamina.client.commands.quantise", "a copy of a base in fewer bits, with its manifest"),
    "spec": ("lamina.client.commands.export", "the schema file that a coordinator needs of a model"),
}


def usage() -> str:
    """The text of `lamina --help`."""
    lines = [f"  {name:<12} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"lamina {__version__}: federated fine-tuning of language models with adapters of unequal rank",
            "",
            "usage: lamina COMMAND [key=value …]      lamina COMMAND --help",
            "",
            *lines,
            "",
            "exit codes: 0 done, 1 a fault of ours, 2 bad configuration or input, 3 quorum or deadline not met,",
            "            4 privacy budget, 5 identity or trust",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Without the program's name; default: `sys.argv`.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if given else 2
    if given[0] in ("--version", "version"):
        print(__version__)
        return 0
    command, *rest = given
    if command not in COMMANDS:
        print(f"error: no command {command!r}.{nearest(command, COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        part = importlib.import_module(COMMANDS[command][0])
        return int(part.main(command, rest))
    except LaminaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "lamina":
            raise
        print(
            f"error: `lamina {command}` needs the package {error.name!r}. Install it with: pip install 'lamina-fl[all]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        then = "; completed rounds are kept, continue with resume=RUN_DIR" if command == "simulate" else ""
        print(f"\ninterrupted{then}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
