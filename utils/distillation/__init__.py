# SPDX-License-Identifier: Apache-2.0
"""What this repository exists for: LIFT, PLACE, the conventional losses, feature distillation."""
