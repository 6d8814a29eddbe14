"""Public test doubles: small random checkpoints of real architectures, word and byte tokenizers, a scripted engine and
teacher, and a fake vLLM server.

For tests of your own horizons, tasks and engines: everything runs the real code paths in milliseconds, nothing is
downloaded.
"""

from headstart.testing.doubles import (
    ARCHITECTURES,
    CHAT,
    CHAT_WITHOUT_SYSTEM,
    SPECIALS,
    WORDS,
    Architecture,
    ScriptedEngine,
    ScriptedScores,
    ScriptedTeacher,
    byte_tokenizer,
    random_model,
    word_tokenizer,
    write_checkpoint,
)
from headstart.testing.server import FakeServer, Faults

__all__ = [
    "ARCHITECTURES",
    "CHAT",
    "CHAT_WITHOUT_SYSTEM",
    "SPECIALS",
    "WORDS",
    "Architecture",
    "FakeServer",
    "Faults",
    "ScriptedEngine",
    "ScriptedScores",
    "ScriptedTeacher",
    "byte_tokenizer",
    "random_model",
    "word_tokenizer",
    "write_checkpoint",
]
