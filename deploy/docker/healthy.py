"""Exit status 0 when a service says that it serves: the images' health check.

healthy.py grpc 127.0.0.1:50051     standard gRPC health checking
healthy.py http 127.0.0.1:8080/ready
"""

import sys

DEADLINE_S = 4.0  # under the check's own time-out, so that the reason is printed


def grpc_health(address: str) -> str:
    """The status' name."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def http_health(address: str) -> str:
    """SERVING for status 200, else the reason."""
    from urllib.error import HTTPError, URLError
    from urllib.request import urlopen

    try:
        with urlopen(f"http://{address}", timeout=DEADLINE_S):
            return "SERVING"
    except HTTPError as error:
        return f"{error.code}: {error.read(500).decode(errors='replace')}"
    except (URLError, OSError) as error:
        return str(error)


if __name__ == "__main__":
    kind, where = sys.argv[1:]
    status = grpc_health(where) if kind == "grpc" else http_health(where)
    print(status)
    sys.exit(0 if status == "SERVING" else 1)
