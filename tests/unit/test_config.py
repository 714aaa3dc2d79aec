"""run.toml: what it accepts, how it refuses, what it remembers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepstep.orchestrator.config import RunConfig, explain_difference, identity, load, parse, settled, to_toml
from keepstep.orchestrator.errors import InputError
from keepstep.orchestrator.rules import shown
from keepstep.orchestrator.sections import known_keys, section_types, value_of
from keepstep.trainer.config import EvaluateSection, TrainerConfig

GOLDEN = Path(__file__).with_name("config_keys.txt")


def problems(text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        parse(text, "run.toml", overrides)
    return caught.value.problems


def problem(text: str, *overrides: str) -> str:
    (only,) = problems(text, *overrides)
    return only


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


class TestDefaults:
    def test_an_empty_file_is_a_whole_config(self) -> None:
        assert parse("", "run.toml") == RunConfig()

    def test_the_defaults_break_no_rule(self) -> None:
        assert parse(to_toml(RunConfig()), "run.toml") == RunConfig()

    def test_every_section_and_key_explains_itself(self) -> None:
        assert [key for key, field in known_keys().items() if not field.description] == []

    def test_the_public_keys_are_pinned(self, rewrite: bool) -> None:
        """A key's name, type and default are an interface; `pytest --rewrite` accepts a change that you meant."""
        lines = (f"{shown(key, field.default)}    # {_type_name(field.annotation)}" for key, field in known_keys().items())
        actual = "".join(f"{line}\n" for line in lines)
        if rewrite:
            GOLDEN.write_text(actual)
        assert actual == GOLDEN.read_text()

    def test_the_trainer_reads_its_part_of_the_resolved_config(self) -> None:
        config = parse("", "run.toml", ["model.layers=2", "cluster.nodes=2"])
        assert TrainerConfig.model_validate_json(config.model_dump_json()).model.layers == 2


def _type_name(annotation: object) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


class TestOverrides:
    def test_the_example_of_the_quickstart_works(self, tmp_path: Path) -> None:
        overrides = [f"run.root={tmp_path}", "run.steps=60", "model.layers=2", "model.width=64", "train.batch_tokens=2048"]
        config = load(write(tmp_path, ""), overrides)
        assert (config.run.root, config.run.steps, config.model.layers) == (str(tmp_path), 60, 2)
        assert (config.model.width, config.train.batch_tokens) == (64, 2048)

    @pytest.mark.parametrize(
        ("override", "value"),
        [
            ("checkpoint.interval=30s", "30s"),
            ("checkpoint.interval=auto", "auto"),
            ("checkpoint.interval=7", 7),
            ('checkpoint.interval="30s"', "30s"),
            ("run.name=2024", "2024"),
            ("run.name=007", "007"),
            ('run.name="x"', "x"),
            ("run.root=2024-01-01", "2024-01-01"),
            ("run.root=s3://bucket/a=b", "s3://bucket/a=b"),
            ("optimizer.lr=1e-3", 1e-3),
            ("cluster.lease_s=3", 3.0),
            (" cluster.nodes = 2 ", 2),
            ('train.script_args=["--a", "b"]', ("--a", "b")),
        ],
    )
    def test_a_value_is_toml_where_it_can_be_and_else_text(self, override: str, value: object) -> None:
        config = parse("[train]\nscript = 'x.py'\n", "run.toml", [override])
        assert value_of(config, override.partition("=")[0].strip()) == value

    def test_an_override_wins_over_the_file_and_the_last_one_over_the_others(self) -> None:
        assert parse("[run]\nsteps = 30\n", "run.toml", ["run.steps=40", "run.steps=50"]).run.steps == 50

    def test_a_value_cannot_smuggle_in_another_key(self) -> None:
        assert problem("", "run.seed=1\nsteps = 2").startswith("-o: run.seed = ")

    @pytest.mark.parametrize("override", ["steps", "steps=60", "run.=1", ".steps=1", "run.steps", ""])
    def test_what_is_no_override_is_refused_with_an_example(self, override: str) -> None:
        assert problem("", override) == f"-o: {override!r} must be section.key=value, for example run.steps=60"

    def test_a_problem_names_the_override_that_caused_it(self) -> None:
        assert problem("[cluster]\nstall_s = 300\n", "cluster.lease_s=400").startswith("-o: cluster.lease_s = 400 must be below")


class TestUnknownKeys:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[cluster]\nlese_s = 3\n", "cluster.lese_s is not a key; did you mean cluster.lease_s?"),
            ("[cluster]\nlr = 3\n", "cluster.lr is not a key; did you mean optimizer.lr?"),
            ("[clutser]\nnodes = 3\n", "[clutser] is not a section; did you mean [cluster]?"),
            ("nodes = 3\n", "nodes = 3 stands outside every section; did you mean cluster.nodes? Write it below [cluster]"),
            ("cluster = 3\n", "cluster = 3 must be a section: write [cluster] and its keys below"),
        ],
    )
    def test_the_nearest_known_one_is_named(self, text: str, message: str) -> None:
        assert problem(text) == f"run.toml: {message}"

    def test_where_nothing_is_near_the_known_ones_are_listed(self) -> None:
        assert problem("[evaluate]\nzzzzzz = 1\n") == "run.toml: evaluate.zzzzzz is not a key; known are " + ", ".join(
            EvaluateSection.model_fields
        )

    def test_an_unknown_override_is_refused_alike(self) -> None:
        assert problem("", "cluster.node=2") == "-o: cluster.node is not a key; did you mean cluster.nodes?"
        assert problem("", "clutser.nodes=2") == "-o: [clutser] is not a section; did you mean [cluster]?"


class TestSectionsInSections:
    """[train.spike] is a section like the others, whichever way it is written."""

    @pytest.mark.parametrize(
        "text",
        ["[train.spike]\nbudget = 7\n", "[train]\nspike.budget = 7\n", "train.spike.budget = 7\n", "[train]\nspike = {budget = 7}\n"],
    )
    def test_every_way_of_toml_to_write_it_is_the_same(self, text: str) -> None:
        assert parse(text, "run.toml").train.spike.budget == 7
        assert parse(text, "run.toml", ["train.loader_workers=2"]).train.spike.budget == 7

    def test_its_keys_are_overridden_by_their_whole_name(self) -> None:
        config = parse("[train.spike]\nbudget = 7\nnats = 2\n", "run.toml", ["train.spike.budget=9", "train.spike.skip=batch"])
        assert (config.train.spike.budget, config.train.spike.nats, config.train.spike.skip) == (9, 2.0, "batch")

    def test_it_is_written_below_its_own_name_and_read_back(self) -> None:
        config = parse("", "run.toml", ["train.spike.sigmas=3", "train.loader_workers=1"])
        assert "\n[train.spike]\n" in to_toml(config)
        assert parse(to_toml(config), "run.toml") == config

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[train.spike]\nbudgte = 3\n", "train.spike.budgte is not a key; did you mean train.spike.budget?"),
            ("[train.spike]\nlr = 3\n", "train.spike.lr is not a key; did you mean optimizer.lr?"),
            ("[train]\nsigmas = 3\n", "train.sigmas is not a key; did you mean train.spike.sigmas?"),
            ("[train.spkie]\nbudget = 3\n", "[train.spkie] is not a section; did you mean [train.spike]?"),
            ("[spike]\nbudget = 3\n", "[spike] is not a section; did you mean [train.spike]?"),
            ("sigmas = 3\n", "sigmas = 3 stands outside every section; did you mean train.spike.sigmas? Write it below [train.spike]"),
            ("[train]\nspike = 3\n", "train.spike = 3 must be a section: write [train.spike] and its keys below"),
            ("[train]\nscript = {a = 1}\n", 'train.script = {"a": 1} must be a valid string'),
            ("[train.spike]\nbudget = 'x'\n", 'train.spike.budget = "x" must be a valid integer'),
            ("[train.spike]\nwindow = 1\n", "train.spike.window = 1 must be greater than or equal to 8"),
            ("[train.spike]\nskip = 'all'\n", "train.spike.skip = \"all\" must be 'samples' or 'batch'"),
            ("[train.spike]\nnats = inf\n", "train.spike.nats = Infinity must be finite"),
        ],
    )
    def test_what_is_wrong_in_it_is_named_in_full(self, text: str, message: str) -> None:
        assert problem(text).startswith(f"run.toml: {message}")

    def test_an_unknown_override_is_refused_alike(self) -> None:
        assert problem("", "train.spike.budgte=2") == "-o: train.spike.budgte is not a key; did you mean train.spike.budget?"
        assert problem("", "train.spike=2").startswith("-o: train.spike = 2 must be a section")
        assert problem("", "a.b.c.d=2").startswith("-o: [a.b.c] is not a section")


class TestTypes:
    @pytest.mark.parametrize(
        ("assignment", "message"),
        [
            ('cluster.nodes = "two"', 'cluster.nodes = "two" must be a valid integer (Nodes of a full gang)'),
            ('cluster.nodes = "2"', 'cluster.nodes = "2" must be a valid integer'),
            ("cluster.nodes = true", "cluster.nodes = true must be a valid integer"),
            ("cluster.nodes = 0", "cluster.nodes = 0 must be greater than or equal to 1"),
            ("cluster.nodes = 1.5", "cluster.nodes = 1.5 must be a valid integer"),
            ("cluster.lease_s = 0", "cluster.lease_s = 0 must be greater than 0"),
            ("run.name = 3", "run.name = 3 must be a valid string"),
            ('run.name = "a b"', 'run.name = "a b" must match pattern'),
            ('data.pack = "word"', "data.pack = \"word\" must be 'stream' or 'documents'"),
            ("checkpoint.interval = true", "checkpoint.interval = true must be a valid integer or be a valid string"),
            ("train.script_args = [1]", "train.script_args[0] = 1 must be a valid string"),
            ("optimizer.lr = nan", "optimizer.lr = NaN must"),
            ("optimizer.lr = inf", "optimizer.lr = Infinity must be finite"),
        ],
    )
    def test_a_wrong_value_is_shown_with_what_it_must_be(self, assignment: str, message: str) -> None:
        assert problem(assignment).startswith(f"run.toml: {message}")

    def test_a_whole_number_is_a_fine_float(self) -> None:
        assert parse("cluster.lease_s = 3", "run.toml").cluster.lease_s == 3.0


# One way to break each rule, and the beginning of what is said: the table of rules is covered, see the last test of the class.
class TestEverythingAtOnce:
    def test_all_problems_of_all_kinds_are_reported_together(self) -> None:
        text = "nodes = 2\n[cluster]\nlese_s = 1\nlease_s = 400\nmin_nodes = 'x'\n[modle]\nwidth = 3\n[model]\nwidth = 130\n"
        found = problems(text, "foo", "optimizer.warmup_steps=900")
        starts = [
            "-o: 'foo' must be",
            "run.toml: nodes = 2 stands outside",
            "run.toml: cluster.lese_s is not a key",
            "run.toml: [modle] is not a section",
            'run.toml: cluster.min_nodes = "x" must be',
            "run.toml: cluster.lease_s = 400 must be below",
            "run.toml: model.heads = 4 must divide",
            "-o: optimizer.warmup_steps = 900 must not exceed",
        ]
        assert [any(line.startswith(start) for line in found) for start in starts] == [True] * len(starts)
        assert len(found) == len(starts)

    def test_a_rule_is_not_asked_about_a_value_that_is_wrong_by_itself(self) -> None:
        assert problem("cluster.lease_s = -1\ncluster.stall_s = 4.5").startswith("run.toml: cluster.lease_s = -1 must be greater")

    def test_the_error_is_a_value_error_of_one_line_per_problem(self) -> None:
        with pytest.raises(ValueError, match=r"^run\.toml: cluster\.a.*\nrun\.toml: cluster\.b"):
            parse("cluster.a = 1\ncluster.b = 2", "run.toml")


class TestFiles:
    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"gone\.toml: no such file; examples/quickstart\.toml"):
            load(tmp_path / "gone.toml")

    def test_a_folder_is_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="a folder, not a file"):
            load(tmp_path)

    def test_text_that_is_not_utf8_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "run.toml"
        path.write_bytes(b"[run]\nname = '\xff'\n")
        with pytest.raises(InputError, match=r"not UTF-8 text \(byte 14\)"):
            load(path)

    def test_what_the_system_refuses_to_read_is_refused_with_its_reason(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be read: File name too long"):
            load(tmp_path / ("x" * 300))

    def test_a_syntax_error_is_located(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"run\.toml: not TOML: .*line 2"):
            load(write(tmp_path, "[run]\nname = \n"))

    def test_a_script_must_exist(self, tmp_path: Path) -> None:
        script = tmp_path / "mine.py"
        with pytest.raises(InputError, match=r"mine\.py\": no such file"):
            load(write(tmp_path, ""), [f"train.script={script}"])
        script.touch()
        assert load(write(tmp_path, ""), [f"train.script={script}"]).train.script == str(script)


class TestResolved:
    def test_the_resolved_config_says_what_every_key_means(self) -> None:
        text = to_toml(RunConfig())
        assert "# Nodes of a full gang.\nnodes = 1\n" in text
        assert all(f"[{section}]\n" in text for section in section_types())
        assert max(map(len, text.splitlines())) <= 120

    @settings(max_examples=20)
    @given(
        name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
        seed=st.integers(0, 2**63 - 1),
        lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
        source=st.text(st.characters(blacklist_categories=["Cs"])),
        arguments=st.lists(st.text(st.characters(blacklist_categories=["Cs"]))),
    )
    def test_what_is_written_is_read_back_equal(self, name: str, seed: int, lr: float, source: str, arguments: list[str]) -> None:
        defaults = RunConfig()
        config = defaults.model_copy(
            update={
                "run": defaults.run.model_copy(update={"name": name, "seed": seed}),
                "optimizer": defaults.optimizer.model_copy(update={"lr": lr}),
                "data": defaults.data.model_copy(update={"source": source}),
                "train": defaults.train.model_copy(update={"script": "x.py", "script_args": tuple(arguments)}),
            }
        )
        assert parse(to_toml(config), "run.toml") == config


def config(*overrides: str) -> RunConfig:
    return parse("", "run.toml", overrides)


FIXED = [
    "run.name=other",
    "run.seed=1",
    "run.steps=300",
    "data.source=text",
    "data.max_bytes=9",
    'data.sources=["a"]',
    'data.skip=["1:2"]',
    "data.order=blocks",
    "data.pack=documents",
    "model.layers=2",
    "model.dropout=0.2",
    "optimizer.lr=0.1",
    "train.batch_tokens=8192",
    "train.micro_batch_samples=1",
    "train.precision=bf16",
    "train.script=x.py",
]
FREE = [
    "run.root=elsewhere",
    "cluster.nodes=2",
    "cluster.ranks_per_node=2",
    "cluster.lease_s=3",
    "checkpoint.interval=7",
    "checkpoint.keep=9",
    "checkpoint.keep_every=1000",
    "checkpoint.scrub=false",
    "evaluate.interval=5",
    "storage.endpoint_url=http://127.0.0.1:1",
    "data.streaming=true",
    "train.spike.sigmas=3",
    "train.spike.budget=9",
]


class TestIdentity:
    @pytest.mark.parametrize("override", FIXED)
    def test_what_decides_the_bits_of_the_history_is_the_run(self, override: str) -> None:
        assert identity(config(override)) != identity(config())

    @pytest.mark.parametrize("override", FREE)
    def test_where_and_how_it_runs_may_change(self, override: str) -> None:
        assert identity(config(override)) == identity(config())
        assert explain_difference(config(), config(override)) == []

    def test_a_run_may_be_prolonged_where_no_learning_rate_depends_on_its_length(self) -> None:
        assert identity(config("optimizer.min_lr_ratio=1", "run.steps=300")) == identity(config("optimizer.min_lr_ratio=1"))

    def test_a_script_is_the_run_whatever_the_unused_sections_say(self) -> None:
        assert identity(config("train.script=x.py", "model.width=64", "run.steps=9")) == identity(config("train.script=x.py"))
        assert identity(config("train.script=x.py", 'train.script_args=["a"]')) != identity(config("train.script=x.py"))

    @pytest.mark.parametrize("override", FIXED)
    def test_a_difference_is_explained_exactly_where_there_is_one(self, override: str) -> None:
        assert any(override.partition("=")[0] in line for line in explain_difference(config(), config(override)))

    def test_the_number_of_logical_ranks_is_that_of_the_start_on_any_nodes(self) -> None:
        exact = ("cluster.exact_reduction=true", "cluster.ranks_per_node=2")
        begun = settled(config(*exact, "cluster.nodes=2"), None)
        assert begun.cluster.logical_ranks == 4
        later = settled(config(*exact, "cluster.nodes=3"), begun)
        assert later.cluster.logical_ranks == 4
        assert identity(later) == identity(begun)
        assert identity(settled(config(*exact, "cluster.nodes=3", "cluster.logical_ranks=6"), begun)) != identity(begun)
        assert identity(begun) != identity(config("cluster.ranks_per_node=2", "cluster.nodes=2"))
        assert settled(config(), None) == config()

    def test_the_explanation_shows_both_values(self) -> None:
        assert explain_difference(config("optimizer.lr=0.5"), config("run.name=b")) == [
            'run.name = "b", but the run that is there has run.name = "keepstep"',
            "optimizer.lr = 0.003, but the run that is there has optimizer.lr = 0.5",
        ]

    def test_the_identity_survives_the_way_through_the_root(self) -> None:
        changed = config("run.name=b", "optimizer.lr=0.1")
        assert identity(parse(to_toml(changed), "run.toml")) == identity(changed)
