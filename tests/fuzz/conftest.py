"""Property tests. `pytest tests/fuzz --fuzz=5000` tries 5,000 random inputs of each property; the suite tries 25."""

import pytest
from hypothesis import HealthCheck, settings

FEW = 25


@pytest.fixture(autouse=True, scope="session")
def silent_opencv():
    """Silence OpenCV and libtiff, which describe thousands of damaged files on stderr."""
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def pytest_configure(config):
    examples = config.getoption("--fuzz", None)
    settings.register_profile(
        "ltjax",
        max_examples=examples or FEW,
        derandomize=not examples,  # the suite tries the same inputs every time
        database=None,
        deadline=None,
        print_blob=bool(examples),
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("ltjax")
