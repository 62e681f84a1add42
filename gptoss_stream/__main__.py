"""python -m gptoss_stream"""

from .cli import main

raise SystemExit(main())
