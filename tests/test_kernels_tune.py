"""The tuner of the Triton kernels, as far as it goes without a GPU; tests/kernels/test_tune.py interprets the rest."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from warm_python import python

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: the tuner was NOT tested"
)


def tune(*arguments):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "COLUMNS": "100"}
    environment.pop("TRITON_INTERPRET", None)
    return python("-m", "perceiver_fast.kernels.tune", *arguments, cwd=ROOT, env=environment)


def test_help_names_the_options():
    done = tune("--help")
    assert done.returncode == 0, done.stderr
    for option in ("--kernel", "--arch", "--out", "--dry-run", "--jobs", "--seconds", "--limit"):
        assert option in done.stdout


def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = tune("--out", str(tmp_path / "configs.json"))
    assert done.returncode == 2
    assert "expected an NVIDIA GPU" in done.stderr and "found none" in done.stderr and "--dry-run" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dry-run"], "expected --arch"),
        (["--dry-run", "--arch", "90", "--kernel", "none[such]"], "expected --kernel to match an entry"),
        (["--dry-run", "--arch", "90", "--limit", "0"], "expected --jobs and --limit"),
    ],
)
def test_arguments_are_checked(arguments, says, capsys):
    from perceiver_fast.kernels.tune import checked, parser

    top = parser()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("torch.cuda.is_available", lambda: False)
        checked(top, top.parse_args(arguments))
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_dry_run_lists_what_compiles(tmp_path):
    out = tmp_path / "configs.json"
    name = "grid_attention_forward[fma]"
    done = tune("--dry-run", "--kernel", name, "--arch", "90", "--limit", "3", "--jobs", "2", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert name in done.stdout and "64 x 32" in done.stdout and "shipped" in done.stdout
    assert "of 3 candidates to be timed" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_shipped_table_round_trips(tmp_path):
    from perceiver_fast.kernels.configs import TABLE, table, write

    write(table(), tmp_path / "configs.json")
    assert (tmp_path / "configs.json").read_bytes() == TABLE.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["configs.json"]


def test_overrides_hold_within_and_nest():
    from perceiver_fast.kernels.configs import Config, config, overridden

    one, other = "grid_attention_forward[fma]", "grid_attention_backward[fma]"
    shipped, new, newer = config(one, 90), Config(16, 16, 2), Config(16, 32, 8)
    with overridden({one: new}):
        assert config(one, 90) is new and config(one, 80) is new and config(other, 90) != new
        with pytest.raises(KeyError), overridden({other: newer}):
            assert config(one, 90) is new and config(other, 90) is newer
            raise KeyError
        assert config(other, 90) != newer
    assert config(one, 90) is shipped


def test_every_entry_has_calls_and_candidates():
    from perceiver_fast.kernels.configs import config, table
    from perceiver_fast.kernels.tune_candidates import CALLS, calls_of, candidates

    used = set()
    for name in table():
        calls, configs = calls_of(name, 90), candidates(name, config(name, 90))
        assert calls and len(configs) == len(set(configs)) > 10 and configs[0] == config(name, 90)
        used.update(calls)
    assert used == set(CALLS)


def test_an_entry_changes_for_its_architecture_alone():
    from perceiver_fast.kernels.configs import Config, config, table
    from perceiver_fast.kernels.tune import put

    new = Config(16, 16, 2)
    for name, archs in table().items():
        entries = dict(archs)
        put(entries, name, 90, new)
        for arch in (80, 86, 100, 120):
            assert entries[max(a for a in entries if a <= arch)] == config(name, arch)
        assert entries[90] == new


def test_what_is_compiled_ahead_is_what_a_call_finds_in_tritons_cache(monkeypatch):
    """Else every candidate would be compiled again, one after the other, before it is timed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from perceiver_fast.kernels import aot, tune_candidates
    from perceiver_fast.kernels.configs import config

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    class Ahead(Exception):
        pass

    def ahead(source, target, options):
        raise Ahead(source.hash())

    found = []

    def called(self, key, signature, device, constexprs, options, attrs, warmup):
        found.append(ASTSource(self, signature, constexprs, attrs).hash())

    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(JITFunction, "_do_compile", called)
    monkeypatch.setattr(triton, "compile", ahead)
    for name in ("grid_attention_forward[fma]", "grid_attention_backward[bf16, wide]", "cross_attention_dq[fp32]"):
        shipped = config(name, 90)
        call = tune_candidates.calls_of(name, 90)[0]
        make = tune_candidates.prepare(call, name, 90, tune_candidates.META)
        launch = next(x for x in tune_candidates.own(make()[-1], shipped) if x.weights)
        with pytest.raises(Ahead) as compiled:
            aot.compile_instance(launch.instance(name), 90)
        launch.kernel.run(grid=(1,), warmup=True, **launch.arguments, **launch.config.options)
        assert found.pop() == str(compiled.value)


def test_log_and_table_are_kept_after_every_entry(tmp_path, monkeypatch):
    from perceiver_fast.kernels import tune
    from perceiver_fast.kernels.configs import Config, config, table

    names, new = (
        ["cross_attention_dkv[fp32]", "cross_attention_dq[fp32]", "grid_attention_forward[fma]"],
        Config(16, 16, 2),
    )
    out = tmp_path / "configs.json"
    args = tune.parser().parse_args(["--out", str(out), "--arch", "90"])

    def choose(name, calls, configs, *rest):
        if name == names[1]:
            raise RuntimeError("no memory")
        if name == names[2]:
            raise tune.OutOfTime
        return new, 0.5, {"all": [], "finalists": []}

    monkeypatch.setattr(tune, "conditions", lambda arch: {"device": "none"})
    monkeypatch.setattr(tune, "choose", choose)
    monkeypatch.setattr(tune.Run, "compile", lambda self, name, *rest: [tune.Need(config(name, 90))])
    assert tune.Run(args, 90).all(names) == 1
    written = json.loads(out.read_text())
    assert written[names[0]]["90"] == {"queries": 16, "tokens": 16, "warps": 2}
    assert {name for name in table() if written[name].get("90") == written[names[0]]["90"]} == {names[0]}
    log = json.loads(next(tmp_path.glob("configs.*-*.json")).read_text())
    assert list(log["entries"]) == names[:2] and log["entries"][names[0]]["gain"] == 0.5
    assert "no memory" in log["entries"][names[1]]["failed"]
