"""`python -m pr2jax.benchmark sandbox` in its smallest form."""

import json

from pr2jax.benchmark import __main__ as cli


def test_smoke_reports_every_way_and_no_wrong_verdict(tmp_path, capsys):
    file = tmp_path / "sandbox.json"
    status = cli.main(["sandbox", "--smoke", "--repeats=1", f"--json={file}"])
    text = capsys.readouterr()
    if status:  # this machine isolates nothing, and says so
        assert "BenchmarkError" in text.err
        return
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["command"] == "sandbox"
    plain, *tiers = report["start"]
    assert plain["name"] == "plain"
    assert {row["name"] for row in tiers} | set(report["missing"]) == {"namespaces", "landlock"}
    for row in report["start"]:
        assert row["tries"] == 2
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["over_plain"] == row["median"] - plain["median"]
    assert report["parallel"]["programs"] == 8
    assert report["parallel"]["wrong_verdicts"] == 0
    assert "programs/s" in text.out
