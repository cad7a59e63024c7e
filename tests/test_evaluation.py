"""Evaluating and calibrating drafters: what counts as a round, and the figures made of rounds."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cluster.bench import calibration as calibration_bench
from cluster.bench import drafters as drafters_bench
from cluster.bench import prompt_sets
from cluster.bench.calibration import FitPlan, fit_drafter, is_calibrated, store, summarise
from cluster.bench.drafter_choice import DrafterChoice
from cluster.bench.drafters import differences
from cluster.bench.evaluation import (
    DrafterRunner,
    Evaluation,
    Settings,
    acceptance_figures,
    confidence_figures,
)
from cluster.bench.plots import plot_positions, plot_reliability
from cluster.bench.prompt_sets import PromptSet, load_prompt_set
from cluster.cli import main
from cluster.engine.target_config import load_tokenizer
from cluster.errors import CheckpointError, ConfigError, DataError
from cluster.models.calibration_file import (
    CalibrationEntry,
    load_calibration,
    save_calibration,
)
from cluster.speculation.calibration import LogitMap, LogitScaling
from cluster.speculation.record import COUPLED, REJECTION, CalibrationKey, VerificationRecord
from cluster.speculation.reliability import RoundTable, length_difference
from cluster.training.corpus import load_documents
from tests.models import TARGET, save_tiny_drafter, save_tiny_target

KEY = CalibrationKey(COUPLED, "greedy")
BLOCK = 4


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    target = save_tiny_target(folder / "target", scale=2.0)
    return target, save_tiny_drafter(folder / "drafter", target)


def tiny_prompts(count: int, length: int = 6) -> PromptSet:
    random = np.random.default_rng(0)
    return PromptSet("tiny", tuple(map(tuple, random.integers(0, 96, (count, length)).tolist())))


# ------------------------------------------------------------------------------------- drafters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dspark=a/b-c", ("b-c", "dspark", "a/b-c")),
        ("mine=eagle3:a/b", ("mine", "eagle3", "a/b")),
        ("eagle3=eagle3:a/b", ("eagle3", "eagle3", "a/b")),
        ("dflash=dspark:a/b", ("dflash", "dspark", "a/b")),
        ("dspark=a:b/c", ("c", "dspark", "a:b/c")),
        ("ngram", ("ngram", "ngram", None)),
        ("lookup=ngram", ("lookup", "ngram", None)),
    ],
)
def test_drafters_are_read(text: str, expected: tuple[str, str, str | None]) -> None:
    choice = DrafterChoice.parse(text)
    assert (choice.name, choice.method, choice.model) == expected


@pytest.mark.parametrize("text", ["medusa=a", "dspark", "ngram=a", "mine=medusa:a", "mine=dspark"])
def test_what_is_no_drafter_is_bad_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--drafter", text]) == 2
    assert "--drafter" in capsys.readouterr().err


def test_two_drafters_of_one_name_are_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--drafter", "dspark=a/x", "--drafter", "dflash=b/x"]) == 2
    assert "NAME=METHOD:DIR" in capsys.readouterr().err


def test_plots_without_matplotlib_are_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    imported = importlib.import_module

    def without(name: str) -> object:
        if name == "matplotlib":
            raise ImportError(name)
        return imported(name)

    monkeypatch.setattr(importlib, "import_module", without)
    assert main(["eval", "--out", str(tmp_path / "out")]) == 2
    assert "[train]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval --seed -1", "--seed: must be 0 or more"),
        ("eval --device cuda", "--device: this machine"),
        ("eval --out {file}/out", "--out: "),
        ("eval --target {file}", "--target: no such folder"),
        ("eval --data a/x.jsonl --data b/x.jsonl", "--data: two are called 'x'"),
        ("calibrate --target none", "--target: no such folder"),
        ("calibrate --drafter ngram", "--drafter: method ngram has no folder"),
        ("calibrate --device cuda", "--device: this machine"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    command: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for module in (drafters_bench, calibration_bench):
        monkeypatch.setattr(module, "DrafterRunner", None)
    (tmp_path / "file").touch()
    try:
        code = main(command.format(file=tmp_path / "file").split())
    except SystemExit as stopped:  # argparse's own way
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------- figures


def make_table() -> RoundTable:
    rounds = [  # request, confidences, accepted
        ("a", (0.9, 0.8, 0.6), 3),
        ("a", (0.9, 0.7, 0.6), 1),
        ("b", (0.5, 0.7, 0.2), 0),
        ("b", (), 0),
    ]
    records = [VerificationRecord(KEY, who, len(c), c, n) for who, c, n in rounds]
    return RoundTable.from_records(records, 3)


def test_acceptance_by_hand() -> None:
    figures = acceptance_figures(make_table())
    assert (figures["rounds"], figures["requests"]) == (4, 2)
    assert figures["acceptance_length"] == 2.0  # (4 + 2 + 1 + 1) / 4
    assert figures["acceptance_rate"] == [0.5, 0.25, 0.25]
    assert figures["conditional_acceptance"] == [round(2 / 3, 4), 0.5, 1.0]
    assert figures["rounds_reached"] == [3, 2, 1]
    assert acceptance_figures(RoundTable.from_records([], 3)) == {"rounds": 0, "requests": 0}


def test_confidence_by_hand() -> None:
    figures = confidence_figures(make_table(), LogitScaling.identity(3))
    # Position 1: 0.9 twice, both accepted; 0.5 once, rejected.
    assert figures["ece"][0] == pytest.approx((0.2 + 0.5) / 3, abs=1e-4)
    # Position 2: survival 0.72 accepted; 0.63 and 0.35 not.
    assert figures["ece"][1] == pytest.approx((0.28 + 0.63 + 0.35) / 3, abs=1e-4)
    assert figures["auc"] == [1.0, 1.0, None]  # of rounds that get there
    assert figures["brier"][0] == pytest.approx((0.01 + 0.01 + 0.25) / 3, abs=1e-4)
    scaled = confidence_figures(make_table(), LogitScaling((LogitMap.straight(2.0, -0.5),) * 3))
    assert scaled["auc"] == figures["auc"]
    assert scaled["ece"] != figures["ece"]


def length_table(lengths: dict[str, list[int]]) -> RoundTable:
    """Rounds of three guesses, by request and with these acceptance lengths."""
    chances = (0.5,) * 3
    records = [
        VerificationRecord(KEY, name, 3, chances, length - 1)
        for name, rounds in lengths.items()
        for length in rounds
    ]
    return RoundTable.from_records(records, 3)


def test_difference_of_two_drafters_by_hand() -> None:
    ours = length_table({"a": [4, 4], "b": [2], "only ours": [1, 1, 1]})
    theirs = length_table({"only theirs": [4], "b": [1, 1], "a": [3]})
    found = length_difference(ours, theirs)
    assert found is not None
    # Rounds weigh alike: 10 / 3 of ours, 5 / 3 of theirs.
    assert found.value == pytest.approx(10 / 3 - 5 / 3)
    # Of two requests one may be drawn twice: "a" alone differs by 1, and so does "b".
    assert (found.low, found.high) == pytest.approx((1.0, 5 / 3))
    assert length_difference(ours, length_table({"c": [2]})) is None


def test_pairing_takes_out_how_hard_a_prompt_is() -> None:
    """Prompts differ by 2, drafters by 1 on each of them: the interval is about the drafters."""
    hard_or_easy = [1 if index % 2 else 3 for index in range(40)]
    worse = length_table({str(i): [n] * 4 for i, n in enumerate(hard_or_easy)})
    better = length_table({str(i): [n + 1] * 4 for i, n in reversed([*enumerate(hard_or_easy)])})
    found = length_difference(better, worse)
    assert found is not None
    assert (found.low, found.value, found.high) == pytest.approx((1.0, 1.0, 1.0))


def test_drafters_are_compared_on_the_same_prompts_only() -> None:
    def evaluation(name: str, prompts: PromptSet, temperature: float, length: int) -> Evaluation:
        return Evaluation(
            drafter=DrafterChoice(name, "dspark", name),
            prompts=prompts,
            temperature=temperature,
            key=KEY,
            table=length_table({"0-0": [length], "0-1": [length]}),
            scaling=LogitScaling.identity(3),
        )

    short, long = tiny_prompts(2), tiny_prompts(2, length=9)
    evaluations = [
        evaluation("x", short, 0.0, 3),
        evaluation("x", short, 1.0, 2),
        evaluation("y", short, 0.0, 2),
        evaluation("y", long, 1.0, 2),  # another set, though of the same name
        evaluation("z", short, 1.0, 1),
    ]
    rows = differences(evaluations, ["x"])
    assert [(r["drafter"], r["temperature"], r["difference"]) for r in rows] == [
        ("y", 0.0, -1.0),
        ("z", 1.0, -1.0),
    ]
    assert {r["baseline"] for r in rows} == {"x"}
    assert differences(evaluations, []) == []


def test_the_suite_leaves_rows_differences_and_pictures(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, drafter = pair
    monkeypatch.setattr(
        drafters_bench, "load_prompt_set", lambda *args, count, **options: tiny_prompts(count)
    )
    drafters = f"--drafter dspark={drafter} --drafter ngram --baseline ngram"
    command = f"bench drafters --target {target} {drafters} --prompts 2 --max-tokens 16"
    assert main([*command.split(), "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "drafters.json").read_text())["figures"]
    rows = {(row["method"], row["temperature"]): row for row in figures["rows"]}
    assert len(rows) == 4
    for found in figures["differences"]:
        ours, base = (rows[name, found["temperature"]] for name in ("dspark", "ngram"))
        difference = ours["acceptance_length"] - base["acceptance_length"]
        assert found["difference"] == pytest.approx(difference, abs=2e-4)
    assert len(figures["differences"]) == 2
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "positions-tiny-0.png",
        "positions-tiny-1.png",
    ]


def test_the_command_prints_tables_and_leaves_everything_in_its_folder(
    pair: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, drafter = pair
    monkeypatch.setattr(
        drafters_bench, "load_prompt_set", lambda *args, count, **options: tiny_prompts(count)
    )
    scaling = LogitScaling((LogitMap.straight(2.0, -0.5),) * BLOCK)
    entry = CalibrationEntry(key=KEY, scaling=scaling, num_rounds=10)
    file = save_calibration(drafter, target, [entry])
    command = f"eval --target {target} --drafter mine=dspark:{drafter} --drafter ngram"
    options = f"--prompts 2 --max-tokens 16 --temperature 0 --out {tmp_path}"
    assert main(f"{command} {options}".split()) == 0
    file.unlink()
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert [row["drafter"] for row in rows] == ["mine", "ngram"]
    mine = rows[0]
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for label, figures, name, form in (
        ("ECE", "confidence", "ece", ".1%"),
        ("ECE calibrated", "calibrated_confidence", "ece", ".1%"),
        ("Brier", "confidence", "brier", ".3f"),
        ("Brier calibrated", "calibrated_confidence", "brier", ".3f"),
        ("AUC", "confidence", "auc", ".3f"),
    ):
        values = [format(v, form) for v in mine[figures][name] if v is not None]
        assert " ".join(["mine tiny 0", label, *values]) in printed
    rates = (f"{value:.2f}" for value in mine["acceptance_rate"])
    assert " ".join(["mine tiny 0", *rates]) in printed
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert {"positions-tiny-0.png", "reliability-mine-tiny-coupled-0.png"} <= pictures
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_broken_line_is_named_before_anything_is_loaded(
    pair: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, drafter = pair
    for module in (drafters_bench, calibration_bench):
        monkeypatch.setattr(module, "DrafterRunner", None)
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "x"}\n{"prompt": "cut\n')
    models = f"--target {target} --drafter dspark={drafter}"
    for command in (
        f"eval {models} --data stdlib-heldout --data {data}",
        f"bench drafters {models} --data {data}",
        f"calibrate {models} --training-data {data}",
        f"calibrate {models} --heldout-data {data}",
    ):
        assert main(command.split()) == 2
        assert f"{data}:2: is not JSON" in capsys.readouterr().err


def test_a_target_that_is_cut_off_is_named_with_its_tensor(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = Path(shutil.copytree(pair[0], tmp_path / "target"))
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    for command in (f"eval --target {target} --drafter ngram", f"profile {target}"):
        assert main(command.split()) == 2
        assert "the file is cut off" in (error := capsys.readouterr().err)
        assert f"{weights}: " in error
        assert "weight" in error


def test_a_baseline_that_is_no_drafter_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "drafters", "--drafter", "ngram", "--baseline", "eagle3"]) == 2
    assert "--baseline" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- rounds


def test_only_rounds_with_room_for_the_whole_block_count(pair: tuple[str, str]) -> None:
    target, drafter = pair
    choice = DrafterChoice("tiny", "dspark", drafter)
    runner = DrafterRunner(target, choice, Settings(max_tokens=20, concurrency=4))
    evaluation = runner.evaluate(tiny_prompts(6), 0.0)
    assert runner.num_positions == BLOCK
    assert set(evaluation.table.num_drafted.tolist()) == {BLOCK}
    figures = evaluation.figures()
    assert figures["requests"] == 6
    assert 1.0 <= figures["acceptance_length"] <= BLOCK + 1
    # Greedy rounds are what they are: again, and one request at a time, they are the same.
    alone = DrafterRunner(target, choice, Settings(max_tokens=20, concurrency=1))
    again = alone.evaluate(tiny_prompts(6), 0.0).figures()
    assert again["rounds"] == figures["rounds"]
    assert again["acceptance_rate"] == figures["acceptance_rate"]


def test_enough_rounds_end_it(pair: tuple[str, str]) -> None:
    target, drafter = pair
    choice = DrafterChoice("tiny", "dspark", drafter)
    runner = DrafterRunner(target, choice, Settings(max_tokens=16, concurrency=2))
    evaluation = runner.evaluate(tiny_prompts(50), 1.0, num_rounds=10)
    assert evaluation.key.verifier == REJECTION
    assert evaluation.table.acceptance is not None
    assert 10 <= len(evaluation.table) < 50


def test_rounds_without_a_proposal_count_one(pair: tuple[str, str]) -> None:
    runner = DrafterRunner(pair[0], DrafterChoice.parse("ngram"), Settings(max_tokens=24))
    evaluation = runner.evaluate(tiny_prompts(3), 1.0, is_seeded=True)
    table = evaluation.table
    assert (table.num_drafted == 0).any()
    assert evaluation.figures()["acceptance_length"] == pytest.approx(
        1 + table.num_accepted.mean(), abs=1e-4
    )


def test_outputs_too_short_for_a_round_are_refused(pair: tuple[str, str]) -> None:
    choice = DrafterChoice("tiny", "dspark", pair[1])
    with pytest.raises(ConfigError, match=f"the least is {BLOCK + 3}"):
        DrafterRunner(pair[0], choice, Settings(max_tokens=BLOCK + 2))
    runner = DrafterRunner(pair[0], choice, Settings(max_tokens=BLOCK + 3))
    assert len(runner.evaluate(tiny_prompts(2), 0.0).table) == 2  # one round each


def test_every_drafter_is_checked_before_the_first_is_run(
    pair: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, drafter = pair
    monkeypatch.setattr(drafters_bench, "DrafterRunner", None)
    other = save_tiny_drafter(tmp_path / "other", save_tiny_target(tmp_path / "t", hidden_size=16))
    cut = Path(save_tiny_drafter(tmp_path / "cut", target)) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-9])
    stale = Path(save_tiny_drafter(tmp_path / "stale", target)) / "calibration.json"
    stale.write_text('{"schema_version": 1}')
    for broken, key in (
        (other, "other/config.json: hidden_size"),
        (str(cut.parent), str(cut)),
        (str(stale.parent), "schema_version"),
    ):
        choices = f"--drafter dspark={drafter} --drafter dspark={broken}"
        assert main(f"eval --target {target} {choices}".split()) == 2
        assert key in capsys.readouterr().err


def test_positions_without_a_token_are_not_judged() -> None:
    assert is_calibrated({"ece_after": [0.01, None], "fits": []})
    assert not is_calibrated({"ece_after": [0.03, None], "fits": []})
    assert not is_calibrated({"ece_after": [None], "fits": []})  # nothing was


def test_calibrating_writes_a_file_that_serves(
    pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, drafter = pair
    choice = DrafterChoice("tiny", "dspark", drafter)
    monkeypatch.setattr(
        calibration_bench, "load_prompt_set", lambda *args, count, **options: tiny_prompts(count)
    )
    plan = FitPlan(
        target=target,
        temperatures=[0.0, 1.0],
        training="stdlib-heldout-fit",
        heldout="stdlib-heldout-judge",
        training_rounds=20,
        heldout_rounds=10,
        num_prompts=8,
        prompt_tokens=6,
    )
    settings = Settings(max_tokens=16, concurrency=4)
    fits = list(fit_drafter(choice, plan, settings, lambda _: None))
    figures = summarise(fits)
    assert [(f["verifier"], f["temperature_bucket"]) for f in figures["fits"]] == [
        (COUPLED, "greedy"),
        (COUPLED, "high"),
        (REJECTION, "high"),
    ]
    for name in ("ece_before", "ece_after", "auc"):
        assert len(figures[name]) == BLOCK
    assert not is_calibrated(figures)  # of ten rounds there is noise alone
    path = store(target, drafter, fits[0], settings)
    # One that cannot be used is not in the way of the next.
    stale = Path(path)
    stale.write_text(stale.read_text().replace('"drafter_digest": "', '"drafter_digest": "x'))
    with pytest.raises(CheckpointError, match="run `dspark calibrate` again"):
        DrafterRunner(target, choice, settings)
    assert next(fit_drafter(choice, plan, settings, lambda _: None)).scaling == fits[0].scaling
    assert [store(target, drafter, fit, settings) for fit in fits] == [path] * 3
    entry = json.loads(Path(path).read_text())["entries"][0]
    assert entry["metrics"]["heldout"]["rounds"] >= 10
    calibration = load_calibration(drafter, target, num_positions=BLOCK)
    assert calibration.fitted == {fit.heldout.key: fit.scaling for fit in fits}
    served = DrafterRunner(target, choice, settings).evaluate(tiny_prompts(2), 0.0)
    assert served.scaling == fits[0].scaling
    assert served.figures()["calibrated_confidence"] is not None
    plot_reliability(served, tmp_path)
    plot_positions([served.figures()], tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "positions-tiny-0.png",
        "reliability-tiny-tiny-coupled-0.png",
    ]
    Path(path).unlink()


def test_a_fit_that_was_made_is_kept_where_the_next_fails(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, drafter = pair
    fit, fitted = calibration_bench.fit_scaling, []

    def fail_at_the_second(table: RoundTable) -> LogitScaling:
        if fitted:
            raise KeyboardInterrupt
        fitted.append(fit(table))
        return fitted[0]

    monkeypatch.setattr(
        calibration_bench, "load_prompt_set", lambda *args, count, **options: tiny_prompts(count)
    )
    monkeypatch.setattr(calibration_bench, "fit_scaling", fail_at_the_second)
    command = f"calibrate --target {target} --drafter dspark={drafter} --max-tokens 16 --prompts 4"
    assert main(f"{command} --rounds 8 --heldout-rounds 8".split()) == 130
    assert load_calibration(drafter, target).fitted == {KEY: fitted[0]}
    (Path(drafter) / "calibration.json").unlink()


def test_prompts_that_were_fitted_on_are_not_judged_on(pair: tuple[str, str]) -> None:
    plan = FitPlan(
        target=pair[0],
        temperatures=[0.0],
        training="a.jsonl",
        heldout="a.jsonl",
        training_rounds=1,
        heldout_rounds=1,
        num_prompts=1,
        prompt_tokens=6,
    )
    fits = fit_drafter(DrafterChoice("tiny", "dspark", pair[1]), plan, Settings(), lambda _: None)
    with pytest.raises(ConfigError, match="--heldout-data"):
        next(fits)


def test_fits_that_cannot_be_kept_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match="one bucket"):
        calibration_bench._combinations([0.9, 1.0], [COUPLED])
    with pytest.raises(ConfigError, match="coupled"):
        calibration_bench._combinations([0.0], [REJECTION])


# -------------------------------------------------------------------------------------- prompts


def test_prompts_of_a_file(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TARGET)
    path = tmp_path / "mine.jsonl"
    rows = [{"turns": ["def add(a, b):"]}, {"prompt": "x = 1\n" * 200}, {"prompt": "import os"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_prompt_set(str(path), tokenizer, count=5, num_tokens=8, max_tokens=40)
    assert found.name == "mine"
    texts = sorted(tokenizer.decode(prompt) for prompt in found.prompts)
    assert texts == ["def add(a, b):", "import os"]  # the long one is left out
    with pytest.raises(DataError, match="no prompt of 2 to 1 tokens"):
        load_prompt_set(str(path), tokenizer, count=5, num_tokens=8, max_tokens=1)


def test_windows_of_code_that_leave_no_room_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(TARGET)
    documents = tuple(group[:1] for group in load_documents())
    monkeypatch.setattr(prompt_sets, "load_documents", lambda: documents)
    for num_tokens, max_tokens in ((100, 99), (10**9, 10**9)):
        with pytest.raises(ConfigError, match="--prompt-tokens"):
            load_prompt_set(
                "stdlib-heldout", tokenizer, count=1, num_tokens=num_tokens, max_tokens=max_tokens
            )


def test_code_prompts_are_windows_of_one_length_and_never_of_both_sets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    documents = tuple(group[:5] for group in load_documents())  # all would take seconds
    monkeypatch.setattr(prompt_sets, "load_documents", lambda: documents)
    tokenizer = load_tokenizer(TARGET)
    heldout, training = (
        load_prompt_set(name, tokenizer, count=40, num_tokens=32, max_tokens=99)
        for name in ("stdlib-heldout", "stdlib-training")
    )
    assert {len(prompt) for prompt in heldout.prompts + training.prompts} == {32}
    assert len(set(heldout.prompts)) == 40
    assert not set(heldout.prompts) & set(training.prompts)
    fitting, judging, everything = (
        load_prompt_set(name, tokenizer, count=10**6, num_tokens=32, max_tokens=99)
        for name in ("stdlib-heldout-fit", "stdlib-heldout-judge", "stdlib-heldout")
    )
    both = sorted(fitting.prompts + judging.prompts)
    assert both == sorted(everything.prompts)  # each window in one of them
    assert 0 <= len(fitting.prompts) - len(judging.prompts) <= 1
