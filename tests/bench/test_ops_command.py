# SPDX-License-Identifier: Apache-2.0
"""`mustdrop bench ops` from its command line: what it prints, what it writes, how it ends."""

from __future__ import annotations

import json

import pytest
import torch
from example import OTHER, QUICK
from typer.testing import CliRunner

from mustdrop_kernels.bench.baselines import names
from mustdrop_kernels.bench.cases import CASES
from mustdrop_kernels.bench.run import default_backends
from mustdrop_kernels.cli.app import app

SERVING = default_backends("cpu")[0]


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def bench(*arguments: str):
    return CliRunner().invoke(app, ["bench", "ops", *arguments])


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """A quick run of three operators on the smallest shape: its result and where its document is."""
    path = tmp_path_factory.mktemp("bench") / "deep" / "bench.json"
    result = bench(QUICK[1], "text_vision_scores", QUICK[0], "--shapes", "tiny", "--quick", "--json", str(path))
    assert result.exit_code == 0, result.output
    return result, path


def test_dry_run_times_nothing(tmp_path):
    path = tmp_path / "none.json"
    result = bench("--dry-run", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert not path.exists()
    text = " ".join(result.output.split())
    for op in CASES:
        assert f"{op} llava-1.5 float32: 671 tokens" in text
        assert f"{op} llava-next float32: 3000 tokens" in text
    assert "not timed: flash-colreduce: it needs a CUDA GPU" in text
    for name in names():
        assert name in text


def test_document_says_what_was_timed(document):
    _, path = document
    found = json.loads(path.read_text())
    assert found["format"] == "mustdrop-bench/2"
    for name in ("name", "threads", "torch", "commit", "copy_bandwidth", "matrix_rate", "load", "load_after"):
        assert name in found["machine"]
    assert [row["op"] for row in found["rows"] if row["candidate"] == SERVING] == [
        QUICK[1], "text_vision_scores", QUICK[0],
    ]  # fmt: skip
    timed = [row for row in found["rows"] if row["status"] == "timed"]
    for row in timed:
        assert 0 < row["q1_us"] <= row["median_us"] <= row["q3_us"]
        assert row["bytes"] > 0
        assert row["rounds"] >= 3
        assert row["ratio"]["q1"] <= row["ratio"]["median"] <= row["ratio"]["q3"]
    ours = [row for row in timed if row["candidate"] == SERVING]
    assert all(row["ratio"]["median"] == 1 for row in ours)
    baselines = [row for row in timed if row["kind"] == "baseline"]
    assert len(baselines) >= 6
    assert all(row["compared"] for row in baselines)
    skipped = {row["candidate"]: row["reason"] for row in found["rows"] if row["status"] == "skipped"}
    assert set(skipped) == {"flash-colreduce", "flash-colsum"}


def test_baselines_that_are_compiled_can_be_left_out():
    with_all, without = (bench("text_vision_scores", "--dry-run", *more).output for more in ((), ("--no-compiled",)))
    assert "compile(text rows)" in " ".join(with_all.split())
    assert "compile(" not in without


def test_the_attention_kernel_that_torch_chose_is_recorded(document):
    rows = [row for row in json.loads(document[1].read_text())["rows"] if row["candidate"] == "attention of the layer"]
    assert [row["detail"] in torch.nn.attention.SDPBackend.__members__ for row in rows] == [True]
    assert f"attention of the layer: {rows[0]['detail']}" in " ".join(document[0].output.split())


def test_a_gpu_s_table_says_how_each_row_was_timed(document, tmp_path):
    found = json.loads(document[1].read_text())
    found["machine"]["device"] = "cuda"
    for row in found["rows"]:
        if row["status"] == "timed":
            how = {"how": "graph"} if row["kind"] == "backend" else {"how": "eager", "why_eager": "it calls item()"}
            row.update(how, host_us=3.0)
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(found))
    shown = bench("--load", str(path)).output
    assert {"how", "graph", "eager"} <= set(shown.split())
    assert "eager, with the gaps that its host leaves: it calls item()" in " ".join(shown.split())
    assert " (eager)" in bench("--load", str(path), "--markdown").output


def test_the_document_is_written_after_each_case(tmp_path, monkeypatch):
    """An interrupt in the third case leaves the two before it, and says so."""
    from mustdrop_kernels.bench import run

    real, calls = run._measure, []

    def interrupted(case, options, tell):
        calls.append(case.op)
        if len(calls) == 3:
            raise KeyboardInterrupt
        if len(calls) == 2:
            assert [row["op"] for row in json.loads(path.read_text())["rows"]] == [QUICK[0]]
        return real(case, options, tell)

    path = tmp_path / "bench.json"
    monkeypatch.setattr(run, "_measure", interrupted)
    words = (*QUICK, "--shapes", "tiny", "--quick", "--baselines", "none")
    result = bench(*words, "--json", str(path))
    assert result.exit_code == 130
    assert "stopped after 2 of 3 cases: interrupted" in " ".join(result.output.split())
    document = json.loads(path.read_text())
    assert [row["op"] for row in document["rows"]] == list(QUICK[:2])
    assert document["cases"] == {"planned": 3, "measured": 2}


def test_table_shows_ours_and_the_baselines(document):
    result, _ = document
    for text in (SERVING, "text rows", "topk + sort", "torch.gather", "quick: few rounds", "attention of the layer"):
        assert text in result.output


def test_load_compare_and_markdown(document):
    _, path = document
    result = bench("--load", str(path), "--compare", str(path))
    assert result.exit_code == 0, result.output
    assert "against the older document" in result.output
    assert "1.00x" in result.output
    table, _, where = bench("--load", str(path), "--markdown").output.strip().partition("\n\n")
    lines = table.splitlines()
    assert lines[0].startswith("| operator | time |"), "what is the same in every row stands below"
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    assert where.startswith("*tiny, float32, ")


def test_comparison_sees_a_change_beyond_the_spread(document, tmp_path):
    from mustdrop_kernels.bench.report import comparison

    new = json.loads(document[1].read_text())
    old = json.loads(document[1].read_text())
    for row in old["rows"]:
        for name in ("median_us", "q1_us", "q3_us"):
            if name in row:
                row[name] *= 1000
    changes = list(comparison(old, new))
    assert len(changes) == sum(row["status"] == "timed" for row in new["rows"])
    assert all(change["apart"] and change["speedup"] == pytest.approx(1000) for change in changes)
    assert not any(change["apart"] for change in comparison(new, new))


def test_documents_of_the_former_format_are_read(document, tmp_path):
    found = json.loads(document[1].read_text())
    rows = [
        {"contender" if name == "candidate" else name: value for name, value in row.items()} for row in found["rows"]
    ]
    for row in rows:
        row["kind"] = "peer" if row["kind"] == "baseline" else row["kind"]
    path = tmp_path / "former.json"
    path.write_text(json.dumps({**found, "format": "mustdrop-bench/1", "rows": rows}))
    for words in (["--markdown"], []):
        assert bench("--load", str(path), *words).output == bench("--load", str(document[1]), *words).output


def test_plots(document, tmp_path):
    pytest.importorskip("matplotlib")
    result = bench("--load", str(document[1]), "--plot", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"cpu-float32-ratios.png", "cpu-float32-roofline.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_plot_of_time_against_tokens(document, tmp_path):
    pytest.importorskip("matplotlib")
    found = json.loads(document[1].read_text())
    rows = [row for row in found["rows"] if row["status"] == "timed" and row["op"] == QUICK[0]]
    sweep = [{**row, "shape": f"images-{n}", "tokens": 95 + 576 * n} for n in (1, 2, 4) for row in rows]
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({**found, "rows": sweep}))
    assert bench("--load", str(path), "--plot", str(tmp_path)).exit_code == 0
    assert (tmp_path / "cpu-float32-tokens.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "there is no operator 'nothing'; there are spatial_merge"),
        (["--backends", "magic"], "there is no backend 'magic'"),
        (["--baselines", "magic"], "there is no baseline 'magic'; there are published"),
        (["--dtype", "int8"], "there is no dtype 'int8'"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--shapes", "llava-9"], "there is no shape 'llava-9'"),
        (["--compare", "missing.json"], "missing.json"),
    ],
)
def test_refusals(arguments, words):
    result = bench(*arguments, "--dry-run")
    assert result.exit_code == 2
    assert words in result.output


def test_foreign_documents_are_refused(tmp_path):
    for text in ("{", "[]", '{"format": "other"}'):
        path = tmp_path / "other.json"
        path.write_text(text)
        result = bench("--load", str(path))
        assert result.exit_code == 2
        assert "other.json is not" in result.output


def test_wrong_baseline_ends_with_status_1(monkeypatch):
    import dataclasses

    from mustdrop_kernels.bench import run

    right = run.baselines_of(OTHER)[0]
    wrong = dataclasses.replace(right, build=lambda case: lambda inputs: [torch.arange(3)] * case.shape.batch)
    monkeypatch.setattr(run, "baselines_of", lambda op: [wrong])
    result = bench(OTHER, "--shapes", "tiny", "--quick", "--threads", "1")
    assert result.exit_code == 1, result.output
    assert "wrong" in result.output


def test_baselines_can_be_chosen():
    result = bench(OTHER, "--shapes", "tiny", "--quick", "--baselines", "none", "--backends", "reference")
    assert result.exit_code == 0, result.output
    assert "topk + sort" not in result.output
    assert "reference" in result.output
