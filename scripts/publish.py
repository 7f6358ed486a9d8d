"""Copies a run's report into `results/`: `python scripts/publish.py runs/demo demo`.

The scores go to `results/NAME.json`, every generated answer to `results/NAME.generations.jsonl.gz`.
"""

import argparse
import gzip
import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "results"


def publish(run: Path, name: str) -> None:
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    lines = []
    for mode, score in report["scores"].items():
        lines += [json.dumps({"mode": mode, **row}, ensure_ascii=False) for row in score.pop("generations")]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    # mtime 0: the same answers make the same file.
    packed = gzip.compress("\n".join(lines).encode(), mtime=0)
    (RESULTS / f"{name}.generations.jsonl.gz").write_bytes(packed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    arguments = parser.parse_args()
    publish(arguments.run, arguments.name)
