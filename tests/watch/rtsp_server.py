"""An RTSP camera for tests, made of GStreamer: `/usr/bin/python3 rtsp_server.py PORT`; Debian's python3-gi runs it.

It prints `ready PORT` when it listens, and shows a ball that moves before black, 320x240, 10 frames a second.
"""

import sys

import gi  # type: ignore[import-not-found]

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # type: ignore[import-not-found]  # noqa: E402

Gst.init(None)
CODER = (
    "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=10 ! rtph264pay config-interval=1 name=pay0 pt=96"
    if Gst.ElementFactory.find("x264enc")
    else "jpegenc ! rtpjpegpay name=pay0 pt=26"
)
server = GstRtspServer.RTSPServer.new()
server.set_address("127.0.0.1")
server.set_service(sys.argv[1])
factory = GstRtspServer.RTSPMediaFactory.new()
factory.set_launch(
    "( videotestsrc is-live=true pattern=ball ! video/x-raw,format=I420,width=320,height=240,framerate=10/1 ! "
    f"{CODER} )"
)
factory.set_shared(True)
server.get_mount_points().add_factory("/live", factory)
if not server.attach(None):
    sys.exit("the port is in use")
print("ready", server.get_bound_port(), flush=True)
GLib.MainLoop().run()
