"""How much each phase of a conversion looks at, in tokens and rows. No torch here."""

from __future__ import annotations

CALIBRATION_TOKENS = 32768
"""Tokens that are calibrated with unless told."""

WINDOW = 2048
"""Tokens per calibration window, or the source's context if that is shorter. Losses grow with
distance beyond it, so it is as long as time allows."""

SHORT_WINDOW = 512
"""Tokens per window of little text, which has to give several of them."""

TOKEN_BYTES = 4
"""Bytes of text per token, about."""

BATCH_TOKENS = 2048
"""Tokens that go through a layer together."""

SCORES = 2**21
"""Attention scores that are held at once where all are looked at."""

TRIAL_QUERIES = 1024
"""Held-out queries, spread evenly, that candidates are judged on; each meets all keys before it."""

TRIAL_BLOCK = 2**22
"""Numbers of queries that a candidate is tried with at once, at least those of one key head. Blocks
above 32 MiB are fresh pages each time: a pass over those takes ten times as long."""

HELD_OUT = 8
"""One window in this many is held out, to choose what statistics cannot say."""

STEP_TOKENS = 2048
"""Tokens of one gradient step of a refinement."""

SENSITIVITY_TOKENS = 8192
"""Calibration tokens whose gradients are looked at, one pass up and one down."""

SENSITIVITY_BATCH = 1024
"""Tokens that go backwards through a layer together."""

LOGITS = 2**21
"""Logits that are held at once: of so many rows of the output matrix as the tokens allow."""

CHECKS = 20
"""How often a refinement looks at the held-out error; the best state found is kept."""

CHECK_STEPS = 5
"""Steps between two checks, at least: a check costs about as much as one."""
