"""python -m gptoss_stream"""

from .cli.main import main

raise SystemExit(main())
