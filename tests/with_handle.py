"""Run a consumer with another `handle`: python with_handle.py consumer.py handle.py [options of the consumer]

The text of handle.py is executed in the consumer's own namespace, so it can also change its constants.
"""

import importlib.util
import logging
import sys
from pathlib import Path

path, handle = (Path(sys.argv.pop(1)) for _ in range(2))
spec = importlib.util.spec_from_file_location(path.stem, path)
assert spec and spec.loader
consumer = importlib.util.module_from_spec(spec)
sys.modules[path.stem] = consumer
spec.loader.exec_module(consumer)
exec(compile(handle.read_text(), str(handle), "exec"), vars(consumer))  # noqa: S102

sys.argv[0] = str(path)
logging.basicConfig(format=f"{path.name}: %(message)s", level=logging.INFO)
logging.getLogger("pika").setLevel(logging.CRITICAL + 1)
sys.exit(consumer.main())
