"""Keeps pytest out of this folder, which is for SGLang's processes and changes what they import."""

collect_ignore_glob = ["*"]
