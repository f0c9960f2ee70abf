"""The few places that touch the internals of PEFT, transformers and bitsandbytes, each with its reason.

If a new version of one of them breaks molora, the mend belongs here. tests/test_compat.py fails loudly when one of the
assumptions no longer holds.
"""
