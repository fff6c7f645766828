"""The parts of `report.html`, built from values alone: `loading` reads and checks a run directory, `losses`, `clients`, `privacy`
and `layers` make one kind of section each, `run_page` and `comparison` put a page together from them and from the pieces in
`lamina.protos.pages`. Only `loading` touches files. Every text that comes from a file is escaped where it becomes markup. What
was not recorded (privacy, an optional file) is left out or said in one line, and nothing here computes a result: a page shows
what the run wrote down. The way in is `lamina.server.report`.
"""
