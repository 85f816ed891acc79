# SPDX-License-Identifier: Apache-2.0
"""Images to features, features to distances."""
