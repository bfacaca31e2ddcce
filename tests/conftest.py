"""No property test looks at the clock: a busy machine is no defect."""

from hypothesis import HealthCheck, settings

settings.register_profile("moeyard", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moeyard")

LONGEST_FIRST = (
    "test_rank_loss",
    "test_parity",
    "test_offload",
    "test_two_nodes",
    "test_bench_offload",
    "test_ranks",
    "test_hybrid",
    "test_offload_ranks",
    "test_bench",
    "test_balanced_layer",
    "test_examples",
    "test_triton",
    "test_parallel_options",
    "test_quantised_experts",
    "test_shared_fill",
    "test_ray",
)
"""Files that take a minute or so, the longest first: one that begins last is waited for by all."""


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
