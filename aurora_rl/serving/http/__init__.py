"""The HTTP front: OpenAI's API over an :class:`~aurora_rl.serving.async_engine.AsyncEngine`."""

import importlib

for _name in ("starlette", "uvicorn", "prometheus_client"):
    try:
        importlib.import_module(_name)
    except ImportError as error:
        raise ImportError(
            f"the HTTP front needs the package {_name}, which is not installed: pip install 'aurora-rl[serve]'"
        ) from error
