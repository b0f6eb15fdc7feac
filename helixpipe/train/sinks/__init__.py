"""Sinks: where the numbers of a run go beside metrics.jsonl. One file a sink, imported when it is asked for.

To add one: a file here with `open_sink(job)`, its line in `sink.SINKS`, and its name among the choices of `run.log`.
"""
