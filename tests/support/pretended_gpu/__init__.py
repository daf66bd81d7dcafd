"""A GPU that isn't there: the engine's real code on tensors that say they are on "cuda" and hold no memory.

Shapes, dtypes, devices, kernel launches, synchronisations and bytes are those of a GPU; there are no numbers. A test
holds its scenario beside it, as a function of the file's top level, and runs it on a machine of its choice:

    from pretended_gpu.child import run
    from pretended_gpu.gpu import Gpu
    from pretended_gpu.machine import Machine

    def scores_twice(gpu: Gpu, family: str) -> dict[str, Any]:
        lm = tiny_lm(family, "cuda")  # pretended_gpu.models
        score(lm, ROWS)
        gpu.watch.clear()  # counts from here
        score(lm, ROWS)
        return {"free": torch.cuda.mem_get_info()[0]}  # JSON values

    def test_a_pass_waits_for_the_gpu_once() -> None:
        report = run(scores_twice, Machine(gpus=2, memory=24 << 30, capability=(7, 5)), family="llama")
        assert report.mixed == {}
        assert sum(report.synchronisations.values()) == 1
        assert report.peak_bytes["cuda:0"] < 100_000 and report.values["free"] > 0

`run_all` runs several scenarios in one child process, which saves its start of three seconds. The counters name the
operation and the engine's line. Bytes that pass the GPU's memory, or a lower `gpu.memory.limits["cuda:0"]`, raise
torch.OutOfMemoryError as the caching allocator does; `torch.cuda.mem_get_info` answers from the same ledger.
The engine's models load as ever (`load_model`): safetensors are read as shapes.

A scenario runs in a child process, because nothing of the pretence can be taken back. It needs torch's CPU build and a
C++ compiler (`requires_pretended_gpu` of pretended_gpu.build skips tests without them).

What it can't see:

- numbers: `item()` gives 0.0001 (True, 1), `allclose` and `equal` are true;
- time, streams and their races: streams and events do nothing;
- pinned memory: it counts as ordinary host memory;
- mapped files, and deep copies of models: FakeTensor can do neither;
- fragmentation, workspaces of libraries, the CUDA context: bytes are those of live tensors, rounded to 512;
- launches that a library adds inside one operation; an operation counts as one;
- FakeTensor itself lets an index on another GPU pass; the watch reports it.
"""
