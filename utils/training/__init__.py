# SPDX-License-Identifier: Apache-2.0
"""What the two training scripts are made of besides their loop."""
