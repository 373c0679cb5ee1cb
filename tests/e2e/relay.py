#!/usr/bin/env python3
"""Passes TCP connections on and keeps every byte, both ways: relay.py LISTEN_PORT TO_PORT FILE."""
import socket
import sys
import threading

listen_port, to_port, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
kept = open(path, "ab", buffering=0)


def copy(source, sink):
    try:
        while data := source.recv(65536):
            kept.write(data)
            sink.sendall(data)
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


server = socket.create_server(("127.0.0.1", listen_port))
while True:
    client, _ = server.accept()
    try:
        upstream = socket.create_connection(("127.0.0.1", to_port))
    except OSError:
        client.close()
        continue
    threading.Thread(target=copy, args=(client, upstream), daemon=True).start()
    threading.Thread(target=copy, args=(upstream, client), daemon=True).start()
