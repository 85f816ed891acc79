# SPDX-License-Identifier: Apache-2.0
"""Smaller students: a plain diffusers config first, the teacher's weights in it second."""
