"""A run's report: every section, honest words, hostile answers, one file that asks for nothing else."""

import hashlib
import html.parser
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from scripts import report_pictures
from scripts._cli import CommandError
from scripts.recipe import TrainingRecipe
from scripts.report import main, write_report
from scripts.report_blocks import Answer
from scripts.report_numbers import (
    clean,
    decimal,
    duration,
    interval,
    p_value,
    percent,
    signed,
    significant,
    size,
)
from scripts.report_pictures import Point, Variants, loss_picture, quantization_picture
from scripts.report_scores import choose_prompts
from scripts.report_verdict import verdict

BASE, TUNED = "base (HF)", "tuned (HF)"
SECTIONS = [
    "Before and after",
    "Answers side by side",
    "Training",
    "Data",
    "Tool use",
    "Files",
    "Certificate",
    "Provenance",
    "How to run it",
]


def share(hits: int, total: int) -> dict:
    return {"hits": hits, "total": total, "share": hits / total, "interval_95": [0.1, 0.9]}


def loss(value: float) -> dict:
    ends = [value - 0.1, value + 0.1]
    about = {"tokens": 4680, "rows": 13, "loss_95": ends, "perplexity_95": [9.5, 24.25]}
    return {"loss": value, "perplexity": round(2.718281828**value, 3), **about}


def contender(kind: str, role: str, value: float, hits: int, **more: object) -> dict:
    groups = {"keywords": share(hits, 8), "punctuation": share(1, 2)}
    names = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
    style = {"tokens_mean": 210.3, "tokens_median": 190, "words_median": 140}
    style |= {"ended": share(3, 4), "clean": share(4, 4), "empty": share(0, 4)}
    style |= {"looping": share(1, 4), "repeated_4grams": 0.12, "distinct_2": 0.7}
    ifeval = {name: share(hits, 8) for name in names} | {"groups": groups}
    about = {"kind": kind, "role": role, "loss": loss(value), "seconds": 4.0}
    return {**about, "ifeval": ifeval, "style": style, **more}


def prompt(number: int, before: bool, now: bool) -> dict:
    def answer(text: str, followed: bool) -> dict:
        verdicts = {"followed": [followed], "loosely": [followed]}
        return {"text": text, "tokens": 12, "ended": followed, **verdicts}

    answers = {BASE: answer(f"old {number}", before), TUNED: answer(f"new {number}", now)}
    rules = ["punctuation:no_comma"]
    return {"id": str(number), "prompt": f"Prompt {number}.", "rules": rules, "answers": answers}


def evaluation() -> dict:
    file = {"file": "tiny-Q8_0.gguf", "sha256": "a" * 64, "type": "Q8_0", "bytes": 144812320}
    speed = {"tokens_per_second": 105.14, "peak_memory_bytes": 309000000}
    return {
        "version": 2,
        "run": "tiny",
        "held_out_file": "outputs/tiny/data/eval.jsonl",
        "adapter_sha256": None,
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base": loss(2.7312),
        "tuned": loss(2.5136),
        "change": {"loss": -0.2176, "loss_95": [-0.25, -0.18], "rows_better": 12, "rows": 13},
        "answers": [{"question": "Почему небо синее?", "base": "Не знаю.", "tuned": "Рассеяние."}],
        "ifeval": {
            "file": "x",
            "prompts": 8,
            "asked": 8,
            "answer_tokens": 512,
            "decoding": "greedy",
        },
        "contenders": {
            BASE: contender("hf", "base", 2.7312, 2),
            TUNED: contender("hf", "tuned", 2.5136, 5),
            "Q8_0": contender("gguf", "tuned", 2.52, 5, **file, **speed),
        },
        "comparisons": [
            {"from": BASE, "to": TUNED, "wins": 4, "ties": 3, "losses": 1, "p_value": 0.375},
            {"from": BASE, "to": "Q8_0", "wins": 8, "ties": 0, "losses": 0, "p_value": 0.0078},
        ],
        "prompts": [prompt(1, False, True), prompt(2, True, False), prompt(3, True, True)],
        "tools": None,
        "machine": {"cpu": "AMD EPYC", "cores": 2, "gpu": None, "memory_bytes": 25e9},
        "commit": "abc1234",
        "versions": {"torch": "2.13.0"},
        "seconds": 236.7,
    }


def certificate(sha256: str = "a" * 64) -> dict:
    checks = [
        {"name": "loads", "passed": True, "value": "llama_cpp 0.3.36", "threshold": "no error"},
        {"name": "mean_kl", "passed": True, "value": 0.003145, "threshold": 0.02},
        {"name": "next_token", "passed": True, "value": {"equal": 10, "prompts": 12}},
    ]
    checks = [{"threshold": None, **check} for check in checks]
    reference = {"kind": "adapter", "name": "tiny/adapter", "sha256": "b" * 64}
    about = {"file": "tiny-Q8_0.gguf", "sha256": sha256, "type": "Q8_0", "reference": reference}
    return {"files": {"tiny-Q8_0.gguf": {**about, "passed": True, "checks": checks}}}


def every_file() -> dict[str, dict]:
    file = {"type": "Q8_0", "bytes": 144812320, "sha256": "a" * 64, "bits_per_weight": 8.506}
    measures = ("choice", "exact", "false_calls", "missed_calls")
    tools = {"requests": {"asked": 240}, "contenders": {"Q8_0 grammar": {"scores": {}}}}
    tools["contenders"]["Q8_0 grammar"]["scores"] = {name: share(7, 9) for name in measures}
    training = {"hash": "c" * 64, "seed": 3407, "loss": 1.2933, "tokens": 71524, "seconds": 745.3}
    training |= {
        "devices": 1,
        "steps": 107,
        "best_step": 60,
        "held_out_loss": 2.3297,
        "padding": 0.0,
    }
    return {
        "evaluation.json": evaluation(),
        "provenance.json": {
            "versions": {"python": "3.11.7"},
            "base_model": {"name": "base", "revision": "main", "fingerprint": "f" * 64},
            "dataset": {"input_hash": "d" * 64},
            "training": training,
        },
        "data/report.json": {
            "dataset": "sample.jsonl",
            "rows_read": 276,
            "left_out": {"over max_rows": 210},
            "train_rows": 53,
            "eval_rows": 13,
            "sources": {"code": 40, "maths": 13},
        },
        "gguf/export.json": {
            "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "current": ["tiny-Q8_0.gguf"],
            "files": {"tiny-Q8_0.gguf": file},
        },
        "gguf/certificate.json": certificate(),
        "adapter/adapter_config.json": {"r": 16},
        "tools_evaluation.json": tools,
    }


METRICS = [{"step": step, "loss": 3 / step, "learning_rate": 1e-4} for step in (1, 2, 3)]


def write_run(folder: Path, files: dict[str, dict]) -> TrainingRecipe:
    """Write a run with these files and no other; give its recipe."""
    recipe = TrainingRecipe(run_name="tiny", output_root=str(folder), tool_rows=160)
    run_dir = recipe.run_dir
    shutil.rmtree(run_dir, ignore_errors=True)
    (run_dir / "adapter").mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(recipe.to_yaml())
    (run_dir / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    (run_dir / "loss.png").write_bytes(b"drawn while training")
    for name, content in files.items():
        path = run_dir / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return recipe


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Write the report of some files, without drawing; give the page and the Markdown file."""
    drawn = Variants("<svg/>", "<svg/>")
    monkeypatch.setattr(report_pictures, "draw_variants", lambda draw: drawn)

    def report(files: dict[str, dict]) -> tuple[str, str]:
        page = write_report(write_run(tmp_path, files))
        return page.read_text(encoding="utf-8"), page.with_suffix(".md").read_text(encoding="utf-8")

    return report


class Page(html.parser.HTMLParser):
    """What a browser sees: tags, what they would fetch, text, cells and text by section."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.fetched: list[str] = re.findall(r"url\(([^)]*)\)|@import ([^;]*)", page)
        self.handlers: list[str] = []
        self.sections: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.text = self._section = ""
        self._in_heading = self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self.fetched += [
            value for name, value in attributes if name in ("src", "href", "srcset", "action")
        ]
        self._in_heading = tag == "h2"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self._in_heading:
            self._section, self._in_heading = data, False
        self.sections[self._section] = self.sections.get(self._section, "") + data
        if self._in_cell:
            self.rows[-1][-1] += data


def markdown_page(text: str) -> Page:
    return Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))


def outside(fetched: list[str]) -> list[str]:
    return [target for target in fetched if not str(target).startswith(("data:", "#"))]


def test_report_has_every_section_in_order(report):
    page, text = report(every_file())
    assert [name for name in Page(page).sections if name] == SECTIONS
    assert re.findall(r"^## (.*)$", text, re.M) == SECTIONS
    assert "hint" not in re.findall(r'class="([^"]*)"', page)


@pytest.mark.parametrize(
    ("name", "module", "sections"),
    [
        ("evaluation.json", "scripts.evaluate_model", SECTIONS[:2]),
        ("provenance.json", "scripts.train_lora", ["Training", "Provenance"]),
        ("data/report.json", "scripts.prepare_data", ["Data"]),
        ("tools_evaluation.json", "scripts.evaluate_tools", ["Tool use"]),
        ("gguf/export.json", "export.export_gguf", ["Files", "How to run it"]),
        ("gguf/certificate.json", "export.verify_gguf", ["Certificate"]),
    ],
)
def test_section_without_its_file_says_how_to_get_it(report, name, module, sections):
    files = every_file()
    assert f"-m {module}" not in Page(report(files)[0]).text
    del files[name]
    page, text = report(files)
    for section in sections:
        assert f"-m {module}" in Page(page).sections[section]
    assert f"-m {module}" in text


def test_run_without_metrics_asks_for_training(report, tmp_path):
    report(every_file())
    (tmp_path / "tiny/metrics.jsonl").unlink()
    page = write_report(TrainingRecipe(run_name="tiny", output_root=str(tmp_path)))
    assert "-m scripts.train_lora" in Page(page.read_text()).sections["Training"]


def test_empty_run_is_a_report_of_hints(report):
    page, text = report({})
    assert "Not evaluated yet." in page
    assert "Not evaluated yet." in text
    found = Page(page).sections
    assert all("-m " in found[name] for name in SECTIONS)
    assert "-m " not in Page(report(every_file())[0]).sections["Data"]


def test_run_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(CommandError, match="does not exist; expected the folder of a run"):
        write_report(TrainingRecipe(run_name="none", output_root=str(tmp_path)))


def test_older_evaluation_is_to_be_repeated(report):
    files = every_file()
    files["evaluation.json"] = {"base": {"loss": 2.7}, "tuned": {"loss": 2.5}, "answers": []}
    found = Page(report(files)[0]).sections["Before and after"]
    assert "older version" in found
    assert "-m scripts.evaluate_model --config" in found


@pytest.mark.parametrize("name", sorted(set(every_file()) - {"adapter/adapter_config.json"}))
def test_file_of_another_form_is_one_line_with_its_name(report, name):
    files = every_file()
    files[name] = {"version": 2, "files": {"x": {}}, "current": ["x"], "contenders": {"x": {}}}
    if name == "provenance.json":
        files[name] = {"training": {"seconds": 1}}
    if name == "gguf/certificate.json":
        files[name] = {"files": {"tiny-Q8_0.gguf": {}}}
    with pytest.raises(CommandError, match=re.escape(name) + ".*is not of the expected form"):
        report(files)


def test_file_that_is_no_json_is_one_line(report, tmp_path):
    report(every_file())
    (tmp_path / "tiny/provenance.json").write_text("{")
    with pytest.raises(CommandError, match=r"provenance.json' is no JSON"):
        write_report(TrainingRecipe(run_name="tiny", output_root=str(tmp_path)))


HOSTILE = [
    "<script>alert(1)</script><img src=https://example.org/x onerror=alert(1)>",
    "</div></details></main><style>*{display:none}</style>",
    "a | b | c\n| --- |\n````\n# heading\n<!-- [x](javascript:alert(1))",
    "```\n</details><iframe src=//example.org></iframe>\n~~~",
    "\x1b[2J\x00\x9b \u202egnp.exe\u2066 \ud800 \uffff {{ head }} {% raw %}",
    "слово" * 400,
    "x = [" + "1, " * 2000 + "]",
    "",
]


def hostile_files(text: str) -> dict[str, dict]:
    """Write a text wherever a model, a row or a person could have written it."""
    files = every_file()
    found = files["evaluation.json"]
    found["answers"] = [{"question": text, "base": text, "tuned": text}]
    for one in found["prompts"]:
        one["prompt"] = text
        for answer in one["answers"].values():
            answer["text"] = text
    name = f"name {text}"[:200]
    found["contenders"][name] = found["contenders"].pop("Q8_0")
    found["comparisons"][1]["to"] = name
    files["data/report.json"]["sources"] = {name: 53}
    files["data/report.json"]["dataset"] = name
    return files


ALLOWED = set(
    re.findall(
        "[a-z0-9]+",
        "html head meta title style body main header nav section article h1 h2 h3 p a div span i small "
        "table thead tbody tr th td dl dt dd ul li pre code picture source img details summary",
    )
)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_does_nothing(report, text):
    plain = Page(report(every_file())[0])
    page, markdown = report(hostile_files(text))
    found = Page(page)
    assert found.tags <= ALLOWED
    assert found.handlers == []
    assert outside(found.fetched) == []
    assert page.count("<img") == len([one for one in plain.fetched if "svg" in str(one)]) // 4
    assert list(found.sections) == list(plain.sections)
    shown = clean(text)
    # Of a folded answer the parts stand behind each other.
    assert "".join(shown.split()) in "".join(found.text.split())
    as_page = markdown_page(markdown)
    assert not as_page.tags & {"script", "iframe", "style"}
    assert as_page.handlers == []
    assert [one for one in outside(as_page.fetched) if one not in _PICTURES] == []
    assert [name for name in as_page.sections if name] == SECTIONS
    assert "".join(shown.split()) in "".join(as_page.text.split())


_PICTURES = ("loss.png", "quantization.svg")


def test_what_is_fetched_or_run_would_be_seen():
    bad = Page("<img src=https://example.org/x onerror=f()><style>a{b:url(//x.y)}</style><script>")
    assert len(outside(bad.fetched)) == 2
    assert bad.handlers == ["onerror"]
    assert not bad.tags <= ALLOWED


def test_page_asks_for_nothing_and_is_the_same_every_time(tmp_path):
    recipe = write_run(tmp_path, every_file())
    (recipe.run_dir / "loss.png").unlink()

    def written() -> list[bytes]:
        write_report(recipe)
        names = ("report.html", "report.md", "quantization.svg")
        return [(recipe.run_dir / name).read_bytes() for name in names]

    first = written()
    assert written() == first
    page = Page(first[0].decode())
    assert outside(page.fetched) == []
    assert sum(str(one).startswith("data:image/svg+xml;base64,") for one in page.fetched) == 8
    assert b"default-src 'none'" in first[0]
    assert "script" not in page.tags
    assert (recipe.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(recipe.run_dir.glob(".*")) == []  # no temporary file is left


def test_another_run_has_another_report(report):
    files = every_file()
    first = report(files)
    assert report(files) == first
    files["evaluation.json"]["tuned"]["perplexity"] = 11.0
    assert [new == old for new, old in zip(report(files), first, strict=True)] == [False, False]


def table_rows(page: Page) -> list[list[str]]:
    """Rows of tables without what their layout adds."""
    rows = [["".join(cell.split()) for cell in row] for row in page.rows]
    return [row for row in rows if any(row)]


def test_page_and_markdown_hold_the_same_tables(report):
    page, text = report(every_file())
    rows = [row for row in table_rows(Page(page)) if len(row) > 2]
    assert rows == [row for row in table_rows(markdown_page(text)) if len(row) > 2]
    assert rows[2][:2] == ["Held-outperplexitylowerisbetter", "15.359.50–24.25"]


# Before and after, in words -------------------------------------------------------------------------


def plain(text: str) -> str:
    """Give a text with one kind of space."""
    return " ".join(text.split())


def judged(ends: list[float] | None, wins: int, losses: int, p: float) -> tuple[str, str]:
    found = evaluation()
    middle = sum(ends) / 2 if ends else -0.1
    found["change"] = {"loss": middle, "loss_95": ends, "rows_better": 9, "rows": 13}
    found["comparisons"][0] |= {"wins": wins, "losses": losses, "p_value": p}
    said, sentences = verdict(found)
    return said.text, plain(said.mark + " " + " ".join(sentences))


TEXT, PROMPTS = "on unseen text", "at following instructions"


@pytest.mark.parametrize(
    ("ends", "counts", "said", "mark"),
    [
        ([-0.25, -0.18], (20, 2, 0.001), f"The model got better {TEXT} and {PROMPTS}.", "good"),
        ([0.18, 0.25], (2, 20, 0.001), f"The model got worse {TEXT} and {PROMPTS}.", "bad"),
        (
            [-0.1, 0.1],
            (5, 4, 0.9),
            f"Undecided: no certain change, neither {TEXT} nor {PROMPTS}.",
            "open",
        ),
        (
            [-0.25, -0.18],
            (5, 4, 0.9),
            f"The model got better {TEXT}; {PROMPTS} there is no certain change.",
            "good",
        ),
        (
            [-0.25, -0.18],
            (2, 20, 0.001),
            f"The model got better {TEXT}, but worse {PROMPTS}.",
            "open",
        ),
        (None, (2, 20, 0.001), f"The model got worse {PROMPTS}; {TEXT} there is no certain", "bad"),
        ([0.1, 0.2], (5, 4, 0.05), f"The model got worse {TEXT}; {PROMPTS} there is no", "bad"),
    ],
)
def test_verdict_says_what_the_figures_say(ends, counts, said, mark):
    text, rest = judged(ends, *counts)
    assert text.startswith(said)
    assert rest.startswith(f"{mark} ")


def test_verdict_without_prompts_is_about_the_loss_alone():
    found = evaluation() | {"comparisons": []}
    assert verdict(found)[0].text == f"The model got better {TEXT}."
    found["change"] |= {"loss_95": [-0.3, 0.1]}
    assert verdict(found)[0].text == f"Undecided: no certain change, {TEXT}."


def test_sentences_hold_the_figures():
    _, sentences = judged([-0.25, -0.18], 4, 1, 0.375)
    assert "fell from 2.731 to 2.514 nats per answer token: −0.215" in sentences
    assert "95 % interval −0.250 to −0.180 leaves out 0. It is lower in 9 of 13" in sentences
    assert "more rules in 4, fewer in 1 and as many in 3 (p = 0.38, may be chance)" in sentences
    assert "end by themselves: 75.0 % → 75.0 %. Answers that end in a loop: 25.0 %" in sentences
    _, worse = judged([0.18, 0.25], 1, 8, 0.04)
    assert "Held-out loss rose" in worse
    assert "(p = 0.040, more than chance)" in worse
    assert "includes 0" in judged([-0.1, 0.2], 1, 8, 0.04)[1]


def test_head_has_the_key_figures(report):
    page = plain(Page(report(every_file())[0]).text)
    for figure in ("15.35 → 12.35", "25.0 % → 62.5 %", "144.8 MB", "Q8_0, 105 tokens/s"):
        assert figure in page
    assert "12 min 25 s" in page


def test_files_that_were_not_asked_have_no_scores(report):
    files = every_file()
    files["evaluation.json"]["contenders"]["Q8_0"] |= {"ifeval": None, "style": None}
    rows = {row[0]: row for row in table_rows(Page(report(files)[0]))}
    assert rows["Everyrulefollowedhigherisbetter"][3] == "–"
    assert rows["Held-outlosslowerisbetter"][3] == "2.5202.420–2.620"
    files["evaluation.json"] |= {"comparisons": [], "prompts": [], "ifeval": None}
    for one in files["evaluation.json"]["contenders"].values():
        one |= {"ifeval": None, "style": None}
    names = {row[0] for row in table_rows(Page(report(files)[0]))}
    assert "Held-outlosslowerisbetter" in names
    assert "Everyrulefollowedhigherisbetter" not in names


# What belongs together ------------------------------------------------------------------------------


def test_certificate_of_another_file_does_not_count(report):
    files = every_file()
    page, _ = report(files)
    assert "outdated" not in page
    assert "0.00314" in Page(page).sections["Files"]
    assert "smallest file that passed" in page
    files["gguf/certificate.json"] = certificate("e" * 64)
    page, _ = report(files)
    assert "outdated" in Page(page).sections["Files"]
    assert "0.00314" not in Page(page).sections["Files"]
    assert "smallest file that passed" not in page
    assert "-m export.verify_gguf" in Page(page).sections["Files"]


def test_failed_certificate_says_so(report):
    files = every_file()
    broken = files["gguf/certificate.json"]["files"]["tiny-Q8_0.gguf"]
    broken["passed"] = broken["checks"][1]["passed"] = False
    page, _ = report(files)
    assert "failed" in Page(page).sections["Certificate"]
    assert "2 of 3 checks" in plain(Page(page).sections["Certificate"])
    assert "smallest file that passed" not in page


def test_changed_adapter_is_told(report):
    files = every_file()
    files["evaluation.json"]["adapter_sha256"] = "e" * 64
    assert "The adapter has changed since" in report(files)[0]
    files["evaluation.json"]["adapter_sha256"] = hashlib.sha256(b"weights").hexdigest()
    assert "The adapter has changed since" not in report(files)[0]


def test_tool_calls_of_an_earlier_adapter_do_not_count(report, tmp_path):
    page, _ = report(every_file())
    assert "right choice" in Page(page).sections["Tool use"]
    os.utime(tmp_path / "tiny/tools_evaluation.json", (0, 0))
    page = write_report(TrainingRecipe(run_name="tiny", output_root=str(tmp_path))).read_text()
    assert "right choice" not in page
    assert "The adapter has changed" in Page(page).sections["Tool use"]


# Answers --------------------------------------------------------------------------------------------


def test_prompts_are_chosen_in_proportion_and_with_every_outcome():
    kinds = [(False, True)] * 20 + [(True, False)] * 2 + [(True, True)] * 60
    prompts = [prompt(number, *kind) for number, kind in enumerate(kinds)]
    chosen = choose_prompts(prompts, (BASE, TUNED))
    assert {outcome: len(some) for outcome, some in chosen.items()} == {
        "win": 3,
        "loss": 1,
        "tie": 8,
    }
    assert chosen == choose_prompts(prompts, (BASE, TUNED))
    assert [one["id"] for one in chosen["win"]] == ["0", "6", "13"]  # spread, not the first ones
    few = choose_prompts(prompts[18:23], (BASE, TUNED))
    assert {outcome: len(some) for outcome, some in few.items()} == {"win": 2, "loss": 2, "tie": 1}


def test_answers_are_side_by_side_with_their_rules(report):
    found = Page(report(every_file())[0]).sections["Answers side by side"]
    assert "1 of 1 wins, 1 of 1 losses, 1 of 1 ties" in found
    before, now = found.split("old 1")[1].split("new 1")
    assert "not followed punctuation: no comma" in before
    assert now.index("followed punctuation: no comma") < now.index("old 2")
    assert "Рассеяние." in found


def test_long_answers_are_folded_and_nothing_is_lost():
    for text in ("word " * 300, "line\n" * 60, "х" * 3000, "short", "", " " * 900, "\n" * 60):
        answer = Answer("base", text)
        assert answer.shown + answer.rest == text
    assert Answer("base", "word " * 100).rest == ""
    assert len(Answer("base", "word " * 300).shown) == 414
    assert len(Answer("base", "line\n" * 60).shown.split("\n")) == 10


# Numbers and pictures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (size(144812320), "144.8 MB"),
        (size(999_950), "1.0 MB"),
        (size(1.236e9), "1.24 GB"),
        (size(None), "–"),
        (duration(745.3), "12 min 25 s"),
        (duration(59.97), "1 min 00 s"),
        (duration(7321), "2 h 02 min"),
        (decimal(-1234.567, 2), "−1,234.57"),
        (decimal(None, 2), "–"),
        (decimal(float("nan"), 2), "NaN"),
        (signed(0.218, 2), "+0.22"),
        (significant(0.003145), "0.00314"),
        (significant(1.0), "1.00"),
        (significant(2.469e-06), "2.5 × 10⁻⁶"),
        (significant(0), "0"),
        (interval([2.6, 2.86], 2), "2.60–2.86"),
        (interval([-0.25, -0.18], 2), "−0.25 to −0.18"),
        (p_value(0.39), "= 0.39"),
        (p_value(0.00001), "< 0.001"),
        (percent(0.9333), "93.3 %"),
    ],
)
def test_numbers_have_one_form(shown, expected):
    assert shown.replace("\xa0", " ") == expected


def test_pictures_show_their_files_in_light_and_dark():
    points = [
        Point("Q8_0", 144812320, 0.003145, True),
        Point("F16", 270887200, 0.0, True),
        Point("Q2_K", 88000000, 0.6, False),
    ]
    drawn = quantization_picture(points)
    for text in ("Q8_0", "144.8\xa0MB · 0.00314", "270.9\xa0MB · 0<", "Q2_K (failed)"):
        assert text in drawn.wide
        assert text in drawn.narrow_dark
    assert len({drawn.wide, drawn.wide_dark, drawn.narrow, drawn.narrow_dark}) == 4
    assert "(failed)" not in quantization_picture(points[:1]).wide
    assert quantization_picture(points).wide == drawn.wide


def test_loss_picture_of_one_step_is_drawn():
    drawn = loss_picture(METRICS[:1]).wide
    assert "training loss (smoothed)" in drawn
    assert "held-out loss" not in drawn
    assert "held-out loss" in loss_picture([*METRICS, {"step": 2, "eval_loss": 2.0}]).wide


def test_command_prints_the_path(report, tmp_path, capsys):
    report(every_file())
    config = tmp_path / "tiny/recipe.yaml"
    assert yaml.safe_load(config.read_text())["run_name"] == "tiny"
    assert main(["--config", str(config)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'tiny/report.html'}\n"


def test_files_that_were_measured_on_fewer_rows_are_named(report):
    told = evaluation()
    page, _ = report({"evaluation.json": told})
    assert "For time, measured on fewer of them" not in page
    told["contenders"]["Q8_0"]["loss"]["rows"] = 4
    page, _ = report({"evaluation.json": told})
    said = " ".join(Page(page).text.split())
    assert "For time, measured on fewer of them: Q8_0 on 4 conversations." in said
