"""How much memory a function allocates, from the profiler's record of every allocation: exact and repeatable."""

from torch.profiler import ProfilerActivity, profile


def peak_allocated(function) -> int:
    """The most bytes that torch held on the CPU at any time during `function()`, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
