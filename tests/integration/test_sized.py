"""Sites that look at what they are offered and register for what they can hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamina.protos import ranks
from lamina.protos.messages import Wish
from lamina.server.store import run_directory
from tests import deployment
from tests.deployment import Synthetic
from tests.hostile import eventually
from tests.runs import same_bits

Q, UP = "block.q_proj", "block.up_proj"


def run(tmp_path: Path, words: list[str], wishes: dict[str, Wish]) -> tuple[deployment.Running, dict[str, Synthetic]]:
    with deployment.coordinator(tmp_path / "run", words) as running:
        workers = {name: Synthetic(name, wish=wish) for name, wish in wishes.items()}
        sites = [
            deployment.in_thread(deployment.agent(name, running.port, tmp_path / name, worker=worker, sized=True))
            for name, worker in workers.items()
        ]
        assert running.join() == 0
        for thread, outcome in sites:
            thread.join(20)
            assert outcome == [0]
    return running, workers


def words_of(tmp_path: Path, *more: str) -> list[str]:
    (tmp_path / "spec.json").write_text(deployment.spec().to_json())
    return deployment.words(tmp_path / "spec.json", "insecure=true", *more)


@pytest.mark.parametrize("strategy", ["recompress", "residual", "stack"])
def test_ranks_by_layer_that_sites_chose_give_the_bits_of_a_run_in_memory(tmp_path: Path, strategy: str) -> None:
    chosen = {"north": {Q: 8}, "south": {Q: 1, UP: 3}, "west": {UP: 3}}
    offered = dict(zip(deployment.NAMES, deployment.RANKS, strict=True))
    schema = deployment.spec()
    for name, one in chosen.items():
        assert ranks.numbers(schema, one) <= ranks.numbers(schema, ranks.uniform(schema, offered[name]))
    wishes = {
        "north": Wish(ranks=chosen["north"], format="nf4"),
        "south": Wish(ranks=chosen["south"], format="fp32"),
        "west": Wish(ranks=chosen["west"]),
    }
    words = words_of(tmp_path, f"strategy={strategy}", "lora.allocation=importance", "keep_updates=true")
    running, _ = run(tmp_path, words, wishes)
    assert same_bits(deployment.final(running.path), deployment.fault_free(words, chosen))
    assert all(record["rejections"] == [] for record in run_directory.read_records(running.path))
    told = {
        one["fields"]["client_id"]: (one["fields"]["ranks"], one["fields"]["format"])
        for one in map(json.loads, (running.path / "events.jsonl").read_text().splitlines())
        if one["kind"] == "register"
    }
    assert told == {
        "north": (chosen["north"], "nf4"),
        "south": (chosen["south"], "fp32"),
        "west": (chosen["west"], None),
    }


def test_a_site_may_train_less_than_it_is_offered_in_every_layer(tmp_path: Path) -> None:
    words = words_of(tmp_path, "rounds=1")
    running, _ = run(tmp_path, words, {"north": Wish(2), "south": Wish(ranks={UP: 2}), "west": Wish()})
    expected = {"north": {Q: 2, UP: 2}, "south": {UP: 2}}
    assert same_bits(deployment.final(running.path), deployment.fault_free(words, expected))


@pytest.mark.parametrize("strategy", ["ffa", "alternate", "core"])
def test_slots_that_no_site_trains_stay_empty(tmp_path: Path, strategy: str) -> None:
    """Strategies with common slots keep as many as are offered; the others are as if no more had been offered."""
    words = words_of(tmp_path, f"strategy={strategy}")
    running, _ = run(tmp_path, words, {"north": Wish(2), "south": Wish(ranks={UP: 2}), "west": Wish()})
    least = deployment.fault_free(words, {"north": {Q: 2, UP: 2}, "south": {UP: 2}})
    for module, factors in deployment.final(running.path).lora.items():
        assert factors.rank == 4
        assert least.lora[module].rank == 2
        assert factors.A[:2].tobytes() == least.lora[module].A.tobytes()
        assert factors.B[:, :2].tobytes() == least.lora[module].B.tobytes()
        if factors.core is None:
            assert not factors.B[:, 2:].any()
            continue
        core = least.lora[module].core
        assert core is not None
        assert factors.core[:2, :2].tobytes() == core.tobytes()
        assert not factors.core[2:].any()
        assert not factors.core[:, 2:].any()


@pytest.mark.parametrize(
    ("allocation", "wish", "said"),
    [
        ("uniform", Wish(ranks={Q: 5, UP: 1}), "ranks: expected at most 4 for block.q_proj, got 5"),
        ("importance", Wish(ranks={Q: 16, UP: 16}), "expected an adapter of at most 352 numbers"),
        ("importance", Wish(ranks={Q: 17}), "expected at most 16 for block.q_proj, got 17"),
        ("uniform", Wish(ranks={"block.k_proj": 1}), "expected modules of the run's schema, got 'block.k_proj'"),
        ("uniform", Wish(5), "expected at most rank 4, got lora.rank=5"),
        ("uniform", Wish(ranks={Q: 0}), "expected 1 <= rank"),
        ("uniform", Wish(format="fp7"), "expected format to be one of"),
    ],
)
def test_more_than_is_offered_is_refused(tmp_path: Path, allocation: str, wish: Wish, said: str) -> None:
    words = words_of(tmp_path, f"lora.allocation={allocation}", "clients.start=1", "clients.deadline_s=1", "rounds=1")
    with deployment.coordinator(tmp_path / "run", words) as running:
        worker = Synthetic("north", wish=wish)
        agent = deployment.agent("north", running.port, tmp_path / "north", worker=worker, sized=True)
        thread, outcome = deployment.in_thread(agent)
        thread.join(20)
        assert said in str(outcome[0])
        with pytest.raises(Exception, match="expected at least 1 clients"):
            running.join()


def test_who_only_asks_takes_no_part(tmp_path: Path) -> None:
    words = words_of(tmp_path, "clients.start=1", "clients.deadline_s=2")
    with deployment.coordinator(tmp_path / "run", words) as running:
        agent = deployment.agent("north", running.port, tmp_path / "north", sized=True)
        offer = agent._listener._ask(Wish(), ask=True)
        assert offer.document["rank"] == 4
        assert offer.document["budget"]["train"] == {Q: 4, UP: 4}
        with pytest.raises(Exception, match="expected at least 1 clients within 2 s, 0 came"):
            running.join()
    assert not [one for one in running.events if one["event"] == "registered"]


def test_a_site_that_is_started_again_is_given_what_it_kept(tmp_path: Path) -> None:
    words = words_of(tmp_path)
    with deployment.coordinator(tmp_path / "run", words) as running:
        first, second = (Synthetic("north", wish=Wish(ranks={UP: 2})) for _ in range(2))
        agent = deployment.agent("north", running.port, tmp_path / "north", worker=first, sized=True)
        thread, _ = deployment.in_thread(agent)
        eventually(lambda: any(one["event"] == "registered" for one in running.events))
        agent.stop()
        thread.join(20)
        sites = {"north": second, "south": Synthetic("south"), "west": Synthetic("west")}
        for name, worker in sites.items():
            deployment.in_thread(
                deployment.agent(name, running.port, tmp_path / name, worker=worker, sized=name == "north")
            )
        assert running.join() == 0
    assert (first.sized, second.sized) == ([None], [{"times": 1}])
    assert same_bits(deployment.final(running.path), deployment.fault_free(words, {"north": {UP: 2}}))
