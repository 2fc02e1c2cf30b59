"""Offloading: what is kept lies in a file (CPU) or in pinned memory (GPU), and comes back to the bit."""

import copy
import gc
import os
import pickle
import threading
import weakref
from pathlib import Path

import pytest
import torch
from policies import Net, gradients, same_bits
from torch import nn

from rampde import Binomial, Fp8, Offload, odeint
from rampde.checkpoint.host_copy import FILE_SIZE, HostMemory
from rampde.meter import metered

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (1000,), (3, 5, 7), (4097, 3)])
def test_copy_and_back(shape, dtype):
    tensor = torch.randn(shape).to(dtype)
    copied = HostMemory(None).copy(tensor)
    kept = tensor.clone()
    tensor.copy_(torch.zeros(shape).to(dtype))
    copied.prefetch()
    for _ in range(2):
        back = copied.get()
        assert back.dtype == dtype
        assert torch.equal(back.float(), kept.float())


def test_layouts():
    memory = HostMemory(None)
    for tensor in (
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(6, 4).t(),
        torch.randn(10, 10)[2:5, ::2],
        torch.randn(3, 1).expand(3, 4),
    ):
        back = memory.copy(tensor).get()
        assert torch.equal(back, tensor)
        assert back.stride() == torch.empty_like(tensor).stride()


def test_many_tensors_share_files_and_large_ones_have_their_own():
    memory = HostMemory(None)
    tensors = [torch.randn(n) for n in range(1, 200)] + [torch.randn(FILE_SIZE // 4 + 5)]
    tensors += [torch.randn(n) for n in range(1, 50)]
    copies = [memory.copy(tensor) for tensor in tensors]
    for tensor, copied in zip(tensors, copies, strict=True):
        assert torch.equal(copied.get(), tensor)


def test_files_go_into_the_folder_and_leave_nothing(tmp_path):
    """A file has no name from the start, so that not even a crash leaves one."""
    memory = HostMemory(str(tmp_path))
    copied = memory.copy(torch.randn(1000))
    assert list(tmp_path.iterdir()) == []
    if Path("/proc/self/maps").exists():
        maps = Path("/proc/self/maps").read_text()
        assert str(tmp_path) in maps
        del copied, memory
        gc.collect()
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_folder_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        gradients(
            Net(), torch.randn(3, 5, requires_grad=True), torch.linspace(0, 1, 3), Offload(folder="/no-such-folder"),
            method="rk4",
        )  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells what is resident")
def test_what_is_kept_is_not_resident(tmp_path):
    """Pages that were written are dropped from the process; the system writes them out when it wants to."""

    def resident():
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Rss:"):
                return int(line.split()[1]) * 1024
        raise AssertionError

    memory = HostMemory(str(tmp_path))
    tensor = torch.randn(1 << 20)
    memory.copy(tensor).get()
    before = resident()
    copies = [memory.copy(tensor) for _ in range(32)]
    assert resident() - before < 32 * tensor.nbytes / 4
    assert all(torch.equal(copied.get(), tensor) for copied in copies)
    assert resident() - before < 32 * tensor.nbytes / 4


@pytest.mark.parametrize("policy", ["step", "stage", "lean", "none", 2, Binomial(2, "lean"), Fp8()], ids=repr)
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_bits_of_the_policy_that_is_offloaded(policy, precision):
    net = Net()
    y0 = torch.randn(3, 5, requires_grad=True)
    t = torch.linspace(0, 1, 8)
    parameters = [*net.parameters()]
    expected, _ = gradients(net, y0, t, policy, precision, parameters, method="rk4")
    found, solve = gradients(net, y0, t, Offload(policy), precision, parameters, method="rk4")
    assert same_bits(found, expected)
    assert solve.checkpoint.startswith("offload ")


def test_memory_on_the_device_does_not_grow_with_the_steps():
    """But for a time and a step size in each step, and what Python holds."""
    linear = nn.Linear(256, 256)
    y0 = torch.randn(64, 256, requires_grad=True)

    def peak(policy, steps):
        def call():
            t = torch.tensor([0.0, 1.0])
            y = odeint(linear_of, y0, t, method="rk4", options={"step_size": 1 / steps}, checkpoint=policy)
            torch.autograd.grad(y, [y0, linear.weight], torch.ones_like(y))

        call()
        return metered(call, CPU).peak

    def linear_of(t, y):
        return torch.tanh(linear(y))

    for policy in ("step", "stage", "none"):
        small, large = peak(Offload(policy), 8), peak(Offload(policy), 24)
        # the number of the copy's own allocations differs by no state
        assert large - small < 16 * 100 < y0.nbytes
        assert peak(policy, 24) - peak(policy, 8) >= 16 * y0.nbytes


def test_graphs_save_each_memory_once():
    """The output of one operation that is the input of the next one, and the parameters, which stay where they are."""
    copied = []

    class Counting(HostMemory):
        def copy(self, tensor):
            copied.append(tensor.shape)
            return super().copy(tensor)

    policy = Offload("none")
    policy._memory = Counting(None)
    weight = torch.randn(5, 5, requires_grad=True)
    y0 = torch.randn(3, 5, requires_grad=True)

    def func(t, y):
        h = torch.tanh(y @ weight)
        return h * h.sin()

    found, _ = gradients(func, y0, torch.linspace(0, 1, 3), policy, method="euler", parameters=[weight])
    expected, _ = gradients(func, y0, torch.linspace(0, 1, 3), "none", method="euler", parameters=[weight])
    assert same_bits(found, expected)
    # of each evaluation the hyperbolic tangent and its sine, and the input but for the first one, which is a leaf
    assert copied == [torch.Size([3, 5])] * 5


def test_copies_go_when_the_solve_does():
    policy = Offload("step")
    copies = []
    make = policy._memory.copy

    def noted(tensor):
        copied = make(tensor)
        copies.append(weakref.ref(copied))
        return copied

    policy._memory.copy = noted
    y0 = torch.randn(3, 5, requires_grad=True)
    y = odeint(Net(), y0, torch.linspace(0, 1, 4), method="rk4", checkpoint=policy)
    assert len(copies) == 3
    assert all(copied() is not None for copied in copies)
    y.sum().backward()
    assert all(copied() is None for copied in copies)
    copies.clear()
    y = odeint(Net(), y0, torch.linspace(0, 1, 4), method="rk4", checkpoint=policy)
    del y
    assert all(copied() is None for copied in copies)


def test_one_instance_in_many_threads():
    policy = Offload("step")
    results = {}
    # made here: threads share the generator of random numbers
    problems = [(Net(), torch.randn(3, 5, requires_grad=True)) for _ in range(4)]
    t = torch.linspace(0, 1, 20)

    def work(number):
        net, y0 = problems[number]
        found = gradients(net, y0, t, policy, method="rk4", parameters=[*net.parameters()])[0]
        expected = gradients(net, y0, t, "step", method="rk4", parameters=[*net.parameters()])[0]
        results[number] = same_bits(found, expected)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)


def test_instances_can_be_copied_and_pickled():
    """Models that hold one are copied, and sent to other processes."""
    policy = Offload("lean", folder=os.curdir)
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert other.name == "offload lean"
        assert other._memory is not policy._memory
        assert other._memory.folder == os.curdir


@pytest.mark.cuda
class TestPinned:
    DEVICE = torch.device("cuda")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
    @pytest.mark.parametrize("shape", [(), (0,), (1000,), (512, 1024)])
    def test_copy_and_back(self, shape, dtype):
        memory = HostMemory(None)
        tensors = [torch.randn(shape, device="cuda").to(dtype) for _ in range(6)]
        kept = [tensor.clone() for tensor in tensors]
        copies = []
        for tensor in tensors:
            copies.append(memory.copy(tensor))
            assert copies[-1]._host.is_pinned()
        del tensor, tensors
        # memory that was copied from is used for something else
        noise = [torch.full(shape, 7.0, device="cuda").to(dtype) for _ in range(6)]
        for copied, expected in zip(reversed(copies), reversed(kept), strict=True):
            copied.prefetch()
            back = copied.get()
            assert back.device.type == "cuda"
            assert torch.equal(back.float(), expected.float())
        del noise

    @pytest.mark.parametrize("policy", ["step", "stage", "lean", "none", 2, Fp8()], ids=repr)
    @pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
    def test_bits(self, policy, precision):
        net = Net(size=256).to("cuda")
        y0 = torch.randn(512, 256, device="cuda", requires_grad=True)
        t = torch.linspace(0, 1, 17, device="cuda")
        results = []
        for checkpoint in (policy, Offload(policy)):
            with torch.autocast("cuda", precision):
                y = odeint(net, y0, t, method="rk4", checkpoint=checkpoint)
            results.append(torch.autograd.grad(y.square().sum(), [y0, *net.parameters()]))
        assert same_bits(*results)

    def test_memory_does_not_grow_with_the_steps(self):
        linear = nn.Linear(1024, 1024, device="cuda")
        y0 = torch.randn(4096, 1024, device="cuda", requires_grad=True)

        def peak(policy, steps):
            def call():
                t = torch.tensor([0.0, 1.0], device="cuda")
                options = {"step_size": 1 / steps}
                y = odeint(lambda t, y: torch.tanh(linear(y)), y0, t, method="rk4", options=options, checkpoint=policy)
                torch.autograd.grad(y, [y0, linear.weight], torch.ones_like(y))

            call()
            return metered(call, self.DEVICE).peak

        for policy in ("step", "none"):
            assert peak(Offload(policy), 24) - peak(Offload(policy), 8) < y0.nbytes

    def test_nothing_waits_on_the_host(self):
        linear = nn.Linear(256, 256, device="cuda")
        y0 = torch.randn(512, 256, device="cuda", requires_grad=True)
        policy = Offload("step")

        def train():
            t = torch.linspace(0, 1, 9, device="cuda")
            y = odeint(lambda t, y: linear(y), y0, t, method="rk4", checkpoint=policy)
            return y.sum()

        train().backward()
        loss = train()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
