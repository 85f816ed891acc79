# SPDX-License-Identifier: Apache-2.0
"""Which row comes when, and what becomes of it: pixels, tokens, latents."""
