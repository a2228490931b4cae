"""A store of objects in the place of a folder: what is written is there, whole, and reads back."""

import contextlib
import json
import os
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from pr2jax.core import goodput
from pr2jax.core.checkpoint import Checkpointer, CheckpointError
from pr2jax.core.device import profile, setup_compilation_cache
from pr2jax.core.fetch import fetched
from pr2jax.core.files import check_writable, remove_leftovers, replacing
from pr2jax.core.metrics import MetricWriter, RowWriter, read_jsonl, write_json, write_summary
from pr2jax.core.mirror import Mirror
from pr2jax.core.store import Staged, StorageError, as_path, is_store, kvstore, local
from pr2jax.core.watchdog import Watchdog
from pr2jax.replay.routes import open_routes, save_routes
from pr2jax.train.journal import Journal

RUN = "gs://bucket/runs/one"
SHAPE = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}


def _text(store, name):
    return store.buckets["bucket"]["runs/one/" + name].data.decode()


def _state(value):
    return {"x": jnp.full((3,), float(value))}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pr2jax" / "stores" / "bucket"


def test_paths_of_both_kinds(tmp_path):
    assert os.fspath(as_path(RUN) / "a.json") == RUN + "/a.json"
    assert as_path(as_path(RUN)) == as_path(RUN)
    assert os.fspath(as_path(tmp_path) / "a") == str(tmp_path / "a")
    assert (is_store(RUN), is_store(tmp_path), is_store("runs/one")) == (True, False, False)
    assert local(tmp_path, "this") == tmp_path
    with pytest.raises(StorageError, match="^gs://bucket/runs/one: mode 'eval' needs a folder"):
        local(RUN, "mode 'eval'")
    for bad in ("s3://bucket/x", "gs://", "http://host/x"):
        with pytest.raises(StorageError, match=f"^{bad}: not an address of a store that is known"):
            as_path(bad)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    missing = lambda name: None if name == "gcsfs" else found(name)
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(
        StorageError, match=r'gs://bucket/x: the package gcsfs is missing.*"\[gcs\]"'
    ):
        as_path("gs://bucket/x")


def test_whether_it_can_be_written_is_tried(store):
    check_writable(RUN)
    assert store.names() == []
    assert [method for method, path in store.requests][-1] == "DELETE"
    with pytest.raises(StorageError, match="^gs://gone/x: cannot be written: there is no such b"):
        check_writable("gs://gone/x")
    store.fault = lambda method, path: 403 if path.startswith("/upload") else None
    with pytest.raises(StorageError, match=f"^{RUN}: cannot be written: .*403|orbidden"):
        check_writable(RUN)


def test_a_failing_answer_is_asked_again(store):
    left = [2]

    def fault(method, path):
        left[0] -= method == "POST"
        return 503 if method == "POST" and left[0] >= 0 else None

    store.fault = fault
    write_json(RUN + "/a.json", {"b": 1})
    assert json.loads(_text(store, "a.json")) == {"b": 1}
    assert left[0] < 0


def test_a_file_is_there_whole_or_not_at_all(store):
    path = as_path(RUN) / "big"
    with replacing(path) as file:
        file.write(b"x" * (20 << 20))  # several blocks of an upload
        assert store.names() == []
    assert len(store.buckets["bucket"]["runs/one/big"].data) == 20 << 20
    with contextlib.suppress(ValueError), replacing(path) as file:
        file.write(b"half")
        raise ValueError
    assert len(path.read_bytes()) == 20 << 20
    assert store.names("runs/one/") == ["big"]
    assert remove_leftovers(RUN) == []


def test_rows_arrive_with_sync_and_close_and_are_each_there_once(store):
    rows = RowWriter(RUN + "/rows.jsonl")
    rows.write({"step": 1})
    assert store.names() == []
    rows.sync()
    rows.write({"step": 2})
    assert _text(store, "rows.jsonl") == '{"step": 1}\n'
    rows.close()
    assert _text(store, "rows.jsonl") == '{"step": 1}\n{"step": 2}\n'
    with_torn = _text(store, "rows.jsonl") + '{"step": 3}\n{"ste'
    store.put("bucket", "runs/one/rows.jsonl", with_torn.encode())
    rows = RowWriter(RUN + "/rows.jsonl", resume_step=2)
    rows.write({"step": 3, "again": 1})
    rows.close()
    assert _text(store, "rows.jsonl") == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": 1}\n'


def test_somebody_can_read_along(store, monkeypatch):
    rows = RowWriter(RUN + "/rows.jsonl")
    rows.write({"step": 1})
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 31.0)
    rows.write({"step": 2})
    assert _text(store, "rows.jsonl") == '{"step": 1}\n{"step": 2}\n'
    rows.close()


def test_metrics_and_tensorboard(store):
    with MetricWriter(RUN) as writer:
        writer.write(1, {"loss": 2.5})
        writer.sync()
        writer.write(2, {"loss": 1.5})
        [events] = [n for n in store.names("runs/one/") if n.startswith("tensorboard/")]
        first = len(store.buckets["bucket"]["runs/one/" + events].data)
    assert len(store.buckets["bucket"]["runs/one/" + events].data) > first
    assert [row["loss"] for row in read_jsonl(RUN)] == [2.5, 1.5]
    write_summary(RUN, {"a": np.float32(2.0)})
    assert json.loads(_text(store, "summary.json")) == {"a": 2.0}


def test_only_what_changed_is_uploaded(store):
    with Staged(RUN) as staged:
        (staged.path / "below").mkdir()
        for name in ("a", "below/b"):
            (staged.path / name).write_text(name)
        staged.sync()
        (staged.path / "a").write_text("longer")
        before = {n: x.generation for n, x in store.buckets["bucket"].items()}
        staged.sync()
        after = {n: x.generation for n, x in store.buckets["bucket"].items()}
        assert [n for n in after if after[n] != before[n]] == ["runs/one/a"]
        folder = staged.path
    assert not folder.exists()
    assert (_text(store, "a"), _text(store, "below/b")) == ("longer", "below/b")


def test_what_cannot_be_uploaded_is_told(store):
    rows = RowWriter(RUN + "/rows.jsonl")
    rows.write({"step": 1})
    store.buckets.clear()
    with pytest.raises(StorageError, match=f"^{RUN}/rows.jsonl: cannot be written: there is no"):
        rows.sync()
    with pytest.raises(StorageError, match="no such bucket"):
        write_json(RUN + "/a.json", {})
    with pytest.raises(StorageError, match="no such bucket"):
        rows.close()


def test_the_ledger_of_time_goes_on(store):
    for number in (1, 2):
        with goodput.recording(RUN):
            goodput.started()
            goodput.step_done(RUN + "/rl", number)
    rows = goodput.read(RUN)
    assert [row["process"] for row in rows if "step" in row] == [1, 2]
    assert {row["stage"] for row in rows if "step" in row} == {"rl"}
    found = goodput.summarize(rows)
    assert sum(found["activities"].values()) == pytest.approx(found["seconds"], abs=0.01)


def test_a_journal(store):
    journal = Journal(RUN + "/journal", "run")
    assert (journal.steps(), journal.size()) == ([], 0)
    arrays = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": np.zeros((0, 2), jnp.bfloat16)}
    for step in (3, 4):
        size = journal.write(step, arrays, {"n": step})
    assert (
        size
        == journal.size_of(4)
        == len(store.buckets["bucket"]["runs/one/journal/step_000004.p0.batch"].data)
    )
    found, meta = Journal(RUN + "/journal", "run").read(4)
    assert meta == {"n": 4}
    assert {k: (x.dtype, x.tolist()) for k, x in found.items()} == {
        k: (x.dtype, x.tolist()) for k, x in arrays.items()
    }
    assert journal.read(5) is None
    journal.trim(4)
    assert journal.steps() == [4]
    name = "runs/one/journal/step_000004.p0.batch"
    data = bytearray(store.buckets["bucket"][name].data)
    data[-1] ^= 1
    store.put("bucket", name, data)
    assert journal.read(4) is None
    assert store.names() == []


def test_checkpoints(store, caplog):
    with Checkpointer(RUN + "/checkpoints", keep=2, best_metric="m") as saved:
        for step in (1, 2, 3, 4):
            assert saved.save(step, _state(step), {"position": step}, {"m": -step})
        assert saved.steps() == [1, 3, 4]  # the best one, too
    with Checkpointer(RUN + "/checkpoints", keep=2, best_metric="m") as saved:
        assert saved.best_step() == 1
        state, extra = saved.restore(SHAPE)
        assert (state["x"].tolist(), extra["position"]) == ([4.0] * 3, 4)
        # Half an upload is no checkpoint.
        del store.buckets["bucket"]["runs/one/checkpoints/4/commit_success.txt"]
        assert saved.steps() == [1, 3]
    with Checkpointer(RUN + "/checkpoints", keep=2, best_metric="m") as saved:
        assert saved.steps() == [1, 3]
        assert not [n for n in store.names("runs/one/checkpoints/4") if n]  # its remains are gone
        assert saved.save(4, _state(44), {"position": 4})
        assert saved.restore(SHAPE)[0]["x"].tolist() == [44.0] * 3


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_set_aside(store, harm, caplog):
    with Checkpointer(RUN + "/checkpoints") as saved:
        for step in (1, 2):
            saved.save(step, _state(step), {})
    objects = store.buckets["bucket"]
    name = max((n for n in objects if "/2/state/" in n and "ocdbt" in n), key=len)
    data = bytearray(objects[name].data)
    data[len(data) // 2] ^= 4
    if harm == "gone":
        del objects[name]
    else:
        store.put("bucket", name, data[:-1] if harm == "cut" else data)
    with Checkpointer(RUN + "/checkpoints") as saved:
        step, state, _ = saved.restore_whole(SHAPE)
        assert (step, state["x"].tolist()) == (1, [1.0] * 3)
        assert f"gs://bucket/{name}: damaged" in caplog.text
        assert saved.steps() == [1]
        assert saved.save(2, _state(2), {})
    names = store.names("runs/one/checkpoints/")
    assert {n.split("/")[0] for n in names} == {"1", "2", "damaged"}
    assert len([n for n in names if n.startswith("damaged/2/")]) >= 5


def test_a_bucket_that_vanishes_under_checkpoints(store):
    saved = Checkpointer(RUN + "/checkpoints")
    saved.save(1, _state(1), {})
    saved.wait()
    kept = store.buckets.pop("bucket")
    with contextlib.suppress(CheckpointError):  # now, or when it is waited for
        saved.save(2, _state(2), {})
    with pytest.raises(CheckpointError, match=f"^{RUN}/checkpoints: a save failed"):
        saved.wait()
    store.buckets["bucket"] = kept
    with Checkpointer(RUN + "/checkpoints") as again:
        # What the bucket missed may be marked as a checkpoint when it is back at once: not used.
        step, state, _ = again.restore_whole(SHAPE)
        assert (step, state["x"].tolist()) == (1, [1.0] * 3)
        assert again.steps() == [1]


def test_route_logs(store, tmp_path):
    routes = np.arange(2 * 3 * 4 * 2, dtype=np.uint8).reshape(2, 3, 4, 2) % 5
    for folder in (RUN + "/routes/step_1", str(tmp_path / "routes")):
        save_routes(folder, routes, {"step": 1})
        array, meta = open_routes(folder)
        np.testing.assert_array_equal(array.read().result(), routes)
        assert meta == {"step": 1}
    with pytest.raises(FileNotFoundError, match="no route log at gs://bucket/none"):
        open_routes("gs://bucket/none")
    assert ts.KvStore.open(kvstore(tmp_path / "routes")).result().list().result()


def test_traces_and_stacks(store):
    with profile(RUN + "/profile"):
        jax.jit(lambda x: x + 1)(jnp.zeros(3)).block_until_ready()
    assert any(n.endswith(".xplane.pb") for n in store.names("runs/one/profile/"))
    with Watchdog(RUN, factor=1.0, least_s=0.05) as dog:
        for step in (1, 2):
            dog.begin(step)
            dog.end()
        dog.begin(3)
        for _ in range(200):
            if store.names("runs/one/stacks/"):
                break
            time.sleep(0.05)
        dog.end()
    assert store.names("runs/one/stacks/") == ["step_3.p0.txt"]
    assert "step 3" in _text(store, "stacks/step_3.p0.txt")


def test_compiled_programs(store):
    seconds = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.jax_compilation_cache_dir, getattr(jax.config, seconds)
    try:
        setup_compilation_cache("gs://bucket/xla")
        jax.config.update(seconds, 0.0)
        jax.jit(lambda x: jnp.sin(x) * 17.25)(jnp.ones(5)).block_until_ready()
        assert any(name.startswith("xla/") for name in store.names())
    finally:
        setup_compilation_cache(before[0])
        jax.config.update(seconds, before[1])


def test_inputs_are_copied_once(store, cache, caplog):
    for name in ("a.jsonl", "b.jsonl", "deep/c.jsonl", "deep/d.txt"):
        store.put("bucket", f"data/{name}", name.encode())
    assert fetched("somewhere/else") == "somewhere/else"
    assert fetched("gs://bucket/data/a.jsonl") == str(cache / "data" / "a.jsonl")
    assert (cache / "data" / "a.jsonl").read_text() == "a.jsonl"
    assert fetched("gs://bucket/data") == str(cache / "data")
    assert (cache / "data" / "deep" / "d.txt").read_text() == "deep/d.txt"
    old = (cache / "data" / "b.jsonl").stat().st_ino
    store.put("bucket", "data/a.jsonl", b"A.JSONL")
    fetched("gs://bucket/data/*.jsonl")
    assert (cache / "data" / "a.jsonl").read_text() == "A.JSONL"
    assert (cache / "data" / "b.jsonl").stat().st_ino == old
    del store.buckets["bucket"]["data/b.jsonl"], store.buckets["bucket"]["data/deep/d.txt"]
    fetched("gs://bucket/data/*.jsonl")
    left = {p.relative_to(cache / "data").as_posix() for p in cache.rglob("*") if p.is_file()}
    assert left == {"a.jsonl", "deep/c.jsonl", "deep/d.txt"}  # of what was asked for now
    fetched("gs://bucket/data")
    assert not (cache / "data" / "deep" / "d.txt").exists()
    with pytest.raises(StorageError, match="^gs://bucket/data/x.jsonl: there is no such object"):
        fetched("gs://bucket/data/x.jsonl")
    with pytest.raises(StorageError, match=r"^gs://bucket/data/\*.csv: there is no such object"):
        fetched("gs://bucket/data/*.csv")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("[a]*", ["a.jsonl"]),
        ("deep/*.jsonl", ["deep/c.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "b.jsonl", "deep/c.jsonl"]),
        ("*/d.txt", ["deep/d.txt"]),
        ("**", ["a.jsonl", "b.jsonl", "deep/c.jsonl", "deep/d.txt"]),
    ],
)
def test_a_glob_means_what_it_means_here(store, cache, pattern, names, tmp_path):
    import glob

    for name in ("a.jsonl", "b.jsonl", "deep/c.jsonl", "deep/d.txt"):
        store.put("bucket", f"data/{name}", name.encode())
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_text(name)
    here = glob.glob(str(tmp_path / "here" / pattern), recursive=True)
    files = sorted(os.path.relpath(p, tmp_path / "here") for p in here if os.path.isfile(p))
    assert files == names
    found = glob.glob(fetched(f"gs://bucket/data/{pattern}"), recursive=True)
    copied = sorted(os.path.relpath(p, cache / "data") for p in found if os.path.isfile(p))
    assert copied == names
    assert not [p for p in cache.rglob("*") if p.is_file() and p.name not in str(names)]


def test_a_copy_that_cannot_be_made_is_told(store, cache):
    store.put("bucket", "data/a", b"a")
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    with pytest.raises(StorageError, match="^gs://bucket/data/a: cannot be copied to"):
        fetched("gs://bucket/data/a")


def test_a_mirror_is_the_stores_and_goes_back_there(store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("kept", "changed", "below/gone"):
        store.put("bucket", f"runs/one/{name}", name.encode())
    before = store.buckets["bucket"]["runs/one/kept"].generation
    with Mirror(RUN, every_s=0.1) as folder:
        assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
            *("kept", "changed", "below/gone")
        }
        (folder / "changed").write_text("longer")
        for _ in range(200):
            if _text(store, "changed") == "longer":
                break
            time.sleep(0.05)
        assert _text(store, "changed") == "longer"  # while it runs
        (folder / "below" / "gone").unlink()
        (folder / "new").write_text("new")
        (folder / ".new.77").write_text("not whole yet")
    assert store.names("runs/one/") == ["changed", "kept", "new"]
    assert store.buckets["bucket"]["runs/one/kept"].generation == before
    with Mirror(RUN), pytest.raises(StorageError, match=f"^{RUN}: another process here works in"):
        Mirror(RUN).__enter__()
    (folder / "new").write_text("never uploaded")
    with Mirror(RUN) as again:
        assert again == folder
        assert (folder / "new").read_text() == "new"


def test_a_cleared_cache_clears_no_store(store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store.put("bucket", "runs/one/kept", b"kept")

    def clear():
        with Mirror(RUN) as folder:
            shutil.rmtree(folder)

    with pytest.raises(StorageError, match=f"is gone; {RUN} is left as it was$"):
        clear()
    assert store.names("runs/one/") == ["kept"]


def test_a_mirror_whose_store_is_gone(store, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mirror = Mirror(RUN, every_s=0.05)
    with mirror as folder:
        (folder / "a").write_text("a")
        mirror.sync()
        kept = store.buckets.pop("bucket")
        (folder / "b").write_text("b")
        for _ in range(200):
            if "trying again in" in caplog.text:
                break
            time.sleep(0.05)
        assert f"{RUN}/b: cannot be written: there is no such bucket" in caplog.text
        store.buckets["bucket"] = kept
    assert store.names("runs/one/") == ["a", "b"]

    def lost(error=None):
        with Mirror(RUN) as folder:
            (folder / "c").write_text("c")
            store.buckets.clear()
            if error is not None:
                raise error

    with pytest.raises(StorageError, match="no such bucket"):
        lost()
    store.buckets["bucket"] = {}
    with pytest.raises(ValueError, match="^mine$"):
        lost(ValueError("mine"))
