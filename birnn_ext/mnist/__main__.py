import sys

from birnn_ext.mnist import main

sys.exit(main())
