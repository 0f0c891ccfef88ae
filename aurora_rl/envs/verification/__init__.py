"""Verification: sampling at the target's temperature, and the rules by which drafts are accepted."""
