"""How PEFT comes to know molora: its type, its prefix, and the three tables that are written directly."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

PREFIX = "molora_"


class PeftTypeName(str):
    """A PEFT type that is not in PEFT's enum: a plain string with the `.value` that PEFT and transformers read."""

    @property
    def value(self) -> str:
        """The name itself."""
        return str(self)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return PeftTypeName, (str(self),)


MOLORA = PeftTypeName("MOLORA")


def register_tuner(config: type, tuner: type) -> None:
    """Make PEFT know the type MOLORA.

    PEFT's `register_peft_method` accepts only names of its enum, so the three tables are written directly; nothing
    else consults the enum on the paths that we use. The prefix must be the lower-case type plus `_`, because
    transformers builds it that way in `delete_adapter`.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[MOLORA] = config
    PEFT_TYPE_TO_TUNER_MAPPING[MOLORA] = tuner
    PEFT_TYPE_TO_PREFIX_MAPPING[MOLORA] = PREFIX
