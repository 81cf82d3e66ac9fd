"""The doors: HTTP, Server-Sent Events and Socket.IO, as one ASGI application.

They decide who may do what, check what comes in, and turn errors into documented answers; everything
else is the manager's.
"""
