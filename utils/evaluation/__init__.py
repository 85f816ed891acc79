# SPDX-License-Identifier: Apache-2.0
"""What evaluate_fid.py is made of: pipelines to samples, images to features, the report."""
