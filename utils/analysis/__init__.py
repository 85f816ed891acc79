# SPDX-License-Identifier: Apache-2.0
"""What analyze_error.py is made of: the split of the error, corrected sampling, figures."""
