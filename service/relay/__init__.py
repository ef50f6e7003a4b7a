"""An ASGI application in one process behind HTTP servers in others.

wire     frames over a stream socket, which both sides speak
memory   anonymous shared memory, and which parts of it are taken
front    the application that an HTTP server runs: it passes requests on and answers back
back     the other end: it runs the real application for the requests of one front

A front writes a large body into memory that both map and tells where it lies; heads, small bodies
and responses go over the socket. Nothing here knows what is served.
"""
