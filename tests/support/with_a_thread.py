"""A module that must not be shared: importing it starts a thread."""

import threading

threading.Thread(target=threading.Event().wait, daemon=True).start()
