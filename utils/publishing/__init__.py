# SPDX-License-Identifier: Apache-2.0
"""The student's model card and its way to the Hub."""
