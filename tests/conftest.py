"""What holds for all tests: examples that hypothesis draws are judged by their results, not by a busy machine's clock."""

from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
