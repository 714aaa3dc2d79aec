"""`prepare` that is killed, at any moment, goes on to the same bytes; and its memory does not grow with the text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prepared import Dying, Killed, config, content, die, make_small, write_text

from keepstep.storage.store import Store
from keepstep.trainer import encoding
from keepstep.trainer.index import FOLDER, INDEX, read_index
from keepstep.trainer.preparing import prepare


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch.setattr)


@pytest.mark.slow
@pytest.mark.usefixtures("small_units")
class TestKilled:
    @pytest.mark.parametrize("half", [True, False])
    def test_at_any_write_it_goes_on_to_the_same_bytes(self, text: Path, tmp_path: Path, half: bool) -> None:
        made = config(text, tokenizer="words", deduplicate="exact")
        counting = Dying(tmp_path / "expected", 0, half=half, end=die)
        prepare(made, counting)
        expected, writes = content(tmp_path / "expected"), -counting.left
        assert writes > 30
        for at in range(1, writes + 1):
            root = tmp_path / f"root{at}"
            with pytest.raises(Killed):
                prepare(made, Dying(root, at, half=half, end=die))
            store = Store.open(root)
            if not (root / INDEX).exists():
                assert read_index(store) is None
            prepare(made, store)
            assert content(root) == expected

    def test_it_does_not_do_again_what_is_done(self, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = config(text, tokenizer="words")
        counting = Dying(tmp_path / "expected", 0, half=False, end=die)
        prepare(made, counting)
        root, at = tmp_path / "root", -counting.left // 2
        with pytest.raises(Killed):
            prepare(made, Dying(root, at, half=False, end=die))
        done = [key for key in content(root) if key.endswith(".json") and "unit-" in key]
        assert len(done) > 3
        again = Dying(root, 0, half=False, end=die)
        encoded: list[int] = []
        monkeypatch.setattr("keepstep.trainer.preparing.make_plan", die)
        encode = encoding.Encoder.encode
        monkeypatch.setattr(encoding.Encoder, "encode", lambda self, chosen: (encoded.append(len(chosen)), encode(self, chosen))[1])
        prepare(made, again)
        assert -again.left < -counting.left - at + 6  # the unit that was begun, once more
        assert 0 < sum(encoded) < 180
        assert content(root) == content(tmp_path / "expected")

    def test_with_other_text_or_another_config_it_begins_anew(self, text: Path, tmp_path: Path) -> None:
        for number, change in enumerate(("text", "config")):
            root = tmp_path / f"root{number}"
            with pytest.raises(Killed):
                prepare(config(text), Dying(root, 20, half=False, end=die))
            if change == "text":
                (text / "0.txt").write_text("Something else.")
            more = {"held_out": 0.3} if change == "config" else {}
            prepare(config(text, **more), Store.open(root))
            prepare(config(text, **more), Store.open(tmp_path / f"expected{number}"))
            assert content(root) == content(tmp_path / f"expected{number}")

    def test_text_that_changes_on_the_way_is_found_and_leaves_nothing(self, text: Path, tmp_path: Path) -> None:
        def change(what: str, done: int, total: int) -> None:
            if what == "encoding text":
                (text / "5.txt").write_text("Something else.")

        with pytest.raises(ValueError, match=r"data.source = '.*': 5\.txt changed while it was being prepared; prepare again"):
            prepare(config(text), Store.open(tmp_path / "root"), change)
        assert content(tmp_path / "root") == {}
        (text / "more.jsonl").unlink()

        def grow(what: str, done: int, total: int) -> None:
            if what == "encoding text":
                (text / "5.txt").write_text("Something else.\n\n" * 2000)

        with pytest.raises(ValueError, match=r"changed while it was being prepared"):
            prepare(config(text), Store.open(tmp_path / "root"), grow)
        assert content(tmp_path / "root") == {}

    def test_a_damaged_arrays_file_is_named(self, text: Path, tmp_path: Path) -> None:
        root = tmp_path / "root"
        with pytest.raises(Killed):
            prepare(config(text), Dying(root, 20, half=False, end=die))
        path = root / FOLDER / "unit-00000.bin"
        path.write_bytes(bytes(len(path.read_bytes())))
        with pytest.raises(ValueError, match=r"tokens/unit-00000\.bin is damaged; delete the folder tokens/"):
            prepare(config(text), Store.open(root))


KILLS_ITSELF = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import prepared
from keepstep.trainer.preparing import prepare
prepared.make_small()
end = lambda: os.kill(os.getpid(), signal.SIGKILL)
prepare(prepared.config(sys.argv[2], tokenizer="bpe"), prepared.Dying(Path(sys.argv[3]), int(sys.argv[4]), half=True, end=end))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("at", [2, 9, 25])
def test_a_process_that_is_really_killed_leaves_what_the_next_one_goes_on_with(text: Path, tmp_path: Path, at: int) -> None:
    made, root, temporary = config(text, tokenizer="bpe"), tmp_path / "root", tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-W", "ignore", "-c", KILLS_ITSELF, str(Path(__file__).parent), str(text), str(root), str(at)]
    killed = subprocess.run(command, timeout=120, check=False, env={**os.environ, "TMPDIR": str(temporary)})
    assert killed.returncode == -9
    assert list(temporary.iterdir()) == [], "no temporary file outlives it"
    assert (root / FOLDER).exists()
    prepare(made, Store.open(root))
    prepare(made, Store.open(tmp_path / "expected"))
    assert content(root) == content(tmp_path / "expected")


MEASURES_ITSELF = """
import io, json, random, resource, sys
import fsspec, pyarrow, tokenizers
from keepstep.storage.store import Store
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.preparing import prepare

class Made(io.RawIOBase):
    "So many bytes of words, made when they are read."
    def __init__(self, size):
        chance = random.Random(1)
        words = ["".join(chance.choices("abcdefghijklmnop", k=chance.randint(2, 9))) for _ in range(5000)]
        lines = [json.dumps({"text": " ".join(chance.choices(words, k=200))}).encode() + b"\\n" for _ in range(2000)]
        self.block, self.left, self.place = b"".join(lines), size, 0
    def readable(self): return True
    def read(self, size=-1):
        part = self.block[self.place : self.place + min(size, self.left)]
        self.place, self.left = (self.place + len(part)) % len(self.block), self.left - len(part)
        return part if part.endswith(b"\\n") or self.left else part[: part.rfind(b"\\n") + 1]

class Far(fsspec.AbstractFileSystem):
    protocol = "far"
    def info(self, path, **more): return {"name": path, "size": int(path.split(".")[0]), "type": "file"}
    def open(self, path, mode="rb", **more): return Made(int(path.split(".")[0]))

fsspec.register_implementation("far", Far)
size = int(sys.argv[1]) << 20
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = TrainerConfig.model_validate({"data": {"source": f"far://{size}.jsonl", "tokenizer": sys.argv[2], "shard_mb": 4}})
index = prepare(config, Store.open(sys.argv[3]))
print(json.dumps([(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, index.train.text_bytes / 2**20]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("tokenizer", "sizes"), [("bpe", (8, 32)), ("bytes", (24, 96))])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, tokenizer: str, sizes: tuple[int, int]) -> None:
    used = {}
    for megabytes in sizes:
        command = [sys.executable, "-c", MEASURES_ITSELF, str(megabytes), tokenizer, str(tmp_path / f"{megabytes}")]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
        used[megabytes], text_mb = json.loads(answer.stdout)
        assert text_mb > 0.8 * megabytes
    assert used[sizes[1]] < 384
    assert used[sizes[1]] < used[sizes[0]] + 48
