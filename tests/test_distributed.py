"""Solves in several processes: gradients under DistributedDataParallel and FSDP2, steps that all processes agree on.

Two processes run the cases of ``distributed_worker`` once; each test looks at what one case found.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rampde import odeint
from rampde.sharded import may_be_sharded

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("this build of torch has no gloo", allow_module_level=True)

from distributed_worker import CASES, METHODS, POLICIES

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 300  # seconds, on a machine that does other things too

# sums of float64 in another order: some thousand operations of 1e-16 each
ROUNDING = 1e-12


def torchrun(*arguments, cwd=ROOT):
    """What two processes print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """What the cases found, of each the results of both processes."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path, unfinished = folder / "distributed.json", folder / "distributed.unfinished"
    with contextlib.suppress(FileExistsError):
        # one of the processes of pytest starts them, and the others wait
        unfinished.touch(exist_ok=False)
        torchrun(str(Path(__file__).with_name("distributed_worker.py")), str(unfinished))
        unfinished.rename(path)
    for _ in range(LIMIT):
        if path.exists():
            return json.loads(path.read_text())
        time.sleep(1)
    raise TimeoutError("the processes that run the cases did not end")


@pytest.fixture
def find(report):
    """The results of a case, one of each process."""

    def found(name):
        for result in report[name]:
            assert "found" in result, result["raised"]
        return [result["found"] for result in report[name]]

    return found


def names(*prefixes):
    """Cases whose name begins so, as parameters of a test."""
    chosen = [name for name in CASES if name.startswith(prefixes)]
    assert chosen
    return pytest.mark.parametrize("name", chosen)


EXACT = (
    *(f"ddp {method} {policy}" for method in METHODS for policy in POLICIES),
    *(f"fsdp {method}" for method in (*METHODS, "gl4", "implicit_adams")),
    "ddp agreed", "fsdp agreed", "ddp find_unused", "ddp static_graph", "ddp gradient_as_bucket_view", "ddp unused",
    "ddp accumulation", "fsdp accumulation", "ddp two solves", "fsdp two solves", "ddp as func", "fsdp func alone",
    "fsdp closure", "fsdp activation", "fsdp states", "fsdp used late", "fsdp forward method", "fsdp event",
    "ddp continuous", "fsdp continuous",
)  # fmt: skip


class TestGradients:
    @names(*EXACT)
    def test_those_of_one_process(self, find, name):
        for found in find(name):
            assert found["error"] is not None, "a gradient is missing"
            assert found["error"] < ROUNDING

    @names("ddp autocast", "fsdp autocast", "fsdp mixed")
    def test_as_exact_as_those_of_one_process_in_16_bits(self, find, name):
        for found in find(name):
            assert found["error"] is not None, "a gradient is missing"
            assert 0 < found["error"] <= 2 * found["alone"]

    @names("fsdp mixed")
    def test_of_parameters_in_32_bits(self, find, name):
        assert [found["dtypes"] for found in find(name)] == [["torch.float32"]] * 2

    def test_of_unused_parameters_are_zero(self, find):
        assert all(found["zero"] for found in find("ddp unused parameters of f"))

    @names("agreed continuous adjoint")
    def test_continuous_adjoint_after_agreed_steps(self, find, name):
        for found in find(name):
            assert found["error"] <= 2 * found["alone"]


class TestSharded:
    def test_collectives_do_not_grow_with_the_steps(self, find):
        """Parameters are gathered for the solve and for the sweep, gradients summed once."""
        for found in find("fsdp collectives"):
            assert found["counts"] == [{"allgather_base": 2, "reduce_scatter_base": 1}] * 2

    def test_only_what_func_calls_is_gathered(self, find):
        """Encoder, f and head, each gathered twice: not the encoder and the head for the solve once more."""
        for found in find("fsdp closure"):
            assert (found["allgather_base"], found["reduce_scatter_base"]) == (6, 3)

    def test_parameters_are_freed(self, find):
        """After a solve without gradients, one with gradients, an error in f, while the rest of the backward pass runs
        and after it."""
        for found in find("fsdp states"):
            assert found["sharded"] == [True] * 5

    def test_state_keeps_its_bits(self, find):
        """Neither y0 nor the results are cast as inputs and outputs of the module are."""
        expected = {"first": 1 + 2**-12, "dtype": "torch.float32", "gradient": "torch.float32"}
        assert find("fsdp state in 32 bits") == [expected] * 2

    def test_events_have_times_of_their_own(self, find):
        first, second = find("fsdp event")
        assert first["time"] != second["time"]
        assert first["times"] == second["times"] == 0.0

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("fsdp forward method", "(register_fsdp_forward_method) instead of the module itself"),
            ("fsdp1 func", "FullyShardedDataParallel module, which frees its parameters after every evaluation"),
        ],
    )
    def test_falls_back_to_the_tape(self, find, name, reason):
        for found in find(name):
            assert f'{reason}; the solve falls back to checkpoint="tape"' in found["warning"]

    def test_whole_model_in_the_older_way(self, find):
        assert [found["warning"] for found in find("fsdp1 root")] == ["", ""]

    @names("fsdp1")
    def test_gradients_in_the_older_way(self, find, name):
        for found in find(name):
            assert found["error"] < ROUNDING

    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [
            ("fsdp used late", "RuntimeError", r"calls the sharded module FSDPField only after its first evaluation"),
            ("adjoint_params in shards", "ValueError", r"adjoint_params holds shards of parameters, expected None"),
        ],
    )
    def test_errors(self, find, name, error, message):
        for found in find(name):
            assert found["type"] == error
            assert re.search(message, found["message"])

    def test_nothing_is_sharded_in_one_process(self):
        assert not may_be_sharded()


AGREED = [name for name, case in CASES.items() if name.startswith("agreed") and "alone" not in name]
WHOLE = [
    name
    for name in AGREED
    if name not in ("agreed bf16", "agreed random", "agreed collective in func", "agreed continuous adjoint")
]


class TestAgreement:
    @pytest.mark.parametrize("name", WHOLE)
    def test_steps_are_those_of_one_process(self, find, name):
        for found in find(name):
            assert found["evaluations"] == found["alone"]
            assert found["difference"] < ROUNDING

    @pytest.mark.parametrize("name", [name for name in WHOLE if "empty" not in name])
    def test_without_it_each_process_steps_by_itself(self, find, name):
        first, second = find(name)
        assert first["unagreed"] != second["unagreed"]

    @pytest.mark.parametrize(
        ("name", "stages", "start", "more"),
        [
            # evaluations of an attempt, evaluations and collectives before the first one
            ("agreed", 6, 2, 2),
            ("agreed empty", 6, 2, 2),
            ("agreed leaves", 6, 2, 2),
            ("agreed complex", 6, 2, 2),
            ("agreed tensor tolerance", 6, 2, 2),
            ("agreed norm", 6, 2, 2),
            ("agreed tape", 6, 2, 2),
            ("agreed first_step", 6, 1, 0),
        ],
    )
    def test_one_collective_in_an_attempt(self, find, name, stages, start, more):
        for found in find(name):
            attempts, rest = divmod(found["evaluations"] - start, stages)
            assert rest == 0
            assert found["collectives"] == {"allgather": 1, "allreduce": attempts + more}

    def test_with_collectives_in_func(self, find):
        assert all(found["difference"] < ROUNDING for found in find("agreed collective in func"))

    def test_rounding_is_measured_by_all(self, find):
        first, second = find("agreed bf16")
        assert first["evaluations"] == second["evaluations"]
        for found in (first, second):
            assert found["error"] <= 2 * found["alone"]

    def test_random_numbers_in_one_process_only(self, find):
        assert [found["shape"] for found in find("agreed random")] == [[4, 7, 3], [4, 0, 3]]

    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [
            ("not finite at the start", "ValueError", r"not finite in the processes \[1\] of process_group"),
            ("velocity not finite at the start", "RuntimeError", r"func is not finite at the initial state"),
            ("not finite on the way", "RuntimeError", r"underflow in the step size: .* at t = 0\.5,"),
            ("not finite on the way, user's norm", "RuntimeError", r"underflow in the step size: .* at t = 0\.5,"),
            ("not finite in a forced step", "RuntimeError", r"non-finite values in the state .* min_step forced"),
            ("other times", "ValueError", r"t differs .* in the processes \[1\], expected the same"),
            ("with event_fn", "ValueError", r"process_group'\] was given with event_fn, expected one without"),
            ("with batch_axis", "ValueError", r"batch_axis'\] was given with options\['process_group'\], expected"),
            ("in adjoint_options", "ValueError", r"adjoint_options has process_group, expected it in options"),
        ],
    )
    def test_all_processes_raise(self, find, name, error, message):
        for found in find(name):
            assert found["type"] == error
            assert re.search(message, found["message"])

    def test_group_without_this_process(self, find):
        first, second = find("no member")
        assert first == {"type": "", "message": "", "member": True}
        assert second["type"] == "ValueError"
        assert "no member of, expected one of its own groups" in second["message"]


class TestOption:
    Y0, T = torch.ones(3), torch.tensor([0.0, 1.0])

    def test_none_is_the_default(self):
        expected = odeint(lambda t, y: -y, self.Y0, self.T)
        assert torch.equal(odeint(lambda t, y: -y, self.Y0, self.T, options={"process_group": None}), expected)

    @pytest.mark.parametrize("group", ["world", 1, True, [0, 1]])
    def test_no_group(self, group):
        with pytest.raises(TypeError, match=f"process_group is a {type(group).__name__}, expected a torch.distributed"):
            odeint(lambda t, y: -y, self.Y0, self.T, options={"process_group": group})

    def test_not_initialized(self):
        group = dist.ProcessGroup(0, 2)
        with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialized, expected"):
            odeint(lambda t, y: -y, self.Y0, self.T, options={"process_group": group})

    def test_fixed_steps_need_none(self):
        with pytest.warns(UserWarning, match="Unexpected arguments"):
            odeint(lambda t, y: -y, self.Y0, self.T, method="rk4", options={"process_group": None})


@pytest.mark.parametrize(
    "agree", [pytest.param([], marks=pytest.mark.slow, id="alone"), pytest.param(["--agree"], id="agreed")]
)
def test_example(agree, tmp_path):
    pytest.importorskip("tqdm")
    done = torchrun(str(ROOT / "examples" / "ddp.py"), "--iterations", "12", "--batch", "64", *agree, cwd=tmp_path)
    (loss,) = re.findall(r"^loss (\S+) on 2 processes, cpu$", done.stdout, re.MULTILINE)
    losses = [float(shown) for shown in re.findall(r"loss (\d+\.\d+)", done.stderr)]
    assert losses[0] > float(loss) > 0
    # one process has a progress bar
    assert done.stderr.count("| 0/12 [00:00<?, ? steps/s]") == 1
