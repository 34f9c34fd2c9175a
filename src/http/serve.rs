//! The HTTP server: accepts connections up to a limit, each with its own timeouts.
//!
//! Beyond the limit, the server accepts a small reserve of connections for health checks. It speaks only HTTP/1.1: uploads do
//! not flow through it, so HTTP/2 would have no benefit. Each connection carries one request at a time, so the limit of
//! connections is also the limit of concurrent requests.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::header::{CONNECTION, HeaderValue};
use futures_util::FutureExt as _;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use lfs_broker_client::api::ErrorCode;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::client_ip::PeerIp;
use super::connection_limits::{ConnectionLimits, ConnectionPermit, LimitReached, RESERVE_CONNECTIONS};
use super::middleware::{RefusedRequest, final_response};
use super::monitored_io::{ConnectionActivity, ConnectionPhase, ConnectionTimeouts, MonitoredBody, MonitoredIo};
use super::problem::Problem;
use super::tls::Tls;
use super::{Settings, Shutdown, rate_limited};

/// hyper's buffer: the largest request head that is parsed, and how much of a body is read ahead. Each connection may use it.
/// A head above 16 KiB is refused later, with an error code.
const MAX_HEAD_BYTES: usize = 32 << 10;
/// The largest number of headers of a request.
const MAX_HEADERS: usize = 100;
/// How long to wait after `accept` failed, for example because there are no more file descriptors.
const ACCEPT_RETRY_PAUSE: Duration = Duration::from_millis(200);
/// How long a request head may take on a connection in the reserve, and during the shutdown.
const RESERVE_HEAD_TIMEOUT: Duration = Duration::from_secs(2);

/// Serves connections. It has the state that all connections share.
#[derive(Clone)]
struct ConnectionHandler {
    router: Router,
    /// The path prefix of links in responses.
    base_path: Arc<str>,
    tls: Option<Tls>,
    timeouts: ConnectionTimeouts,
    limits: Arc<ConnectionLimits>,
    shutdown: Shutdown,
}

/// Serves until the shutdown, and then finishes the running requests. Dropping this future drops every connection.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    base_path: String,
    tls: Option<Tls>,
    settings: Settings,
    shutdown: Shutdown,
) {
    let timeouts =
        ConnectionTimeouts { head: settings.header_timeout, idle: settings.idle_timeout, write: settings.write_timeout };
    let capacity = Arc::new(Semaphore::new(settings.connections + RESERVE_CONNECTIONS));
    let limits =
        Arc::new(ConnectionLimits::new(settings.connections, settings.connections_per_address, settings.trusted_proxies));
    let stopped = shutdown.stopped.clone();
    let handler = ConnectionHandler { router, base_path: base_path.into(), tls, timeouts, limits, shutdown };
    let mut connections = JoinSet::new();
    loop {
        // Remove finished tasks: a `JoinSet` keeps them until they are joined.
        while connections.try_join_next().is_some() {}
        // At the limit, further clients wait in the kernel's accept queue, which costs the broker nothing.
        let next = async {
            let capacity = Arc::clone(&capacity).acquire_owned().await.expect("the semaphore is never closed");
            listener.accept().await.map(|(stream, peer)| (stream, peer, capacity))
        };
        let next = tokio::select! {
            next = next => next,
            () = stopped.cancelled() => break,
        };
        match next {
            Ok((stream, peer, capacity)) => {
                let served = handler.accept_connection(stream, peer);
                connections.spawn(async move {
                    served.await;
                    drop(capacity);
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection: {error}; retrying in {} ms", ACCEPT_RETRY_PAUSE.as_millis());
                tokio::time::sleep(ACCEPT_RETRY_PAUSE).await;
            }
        }
    }
    // Serve the connections in the accept queue too: closing the listener would reset them.
    tokio::task::yield_now().await;
    while let Some(Ok((stream, peer))) = listener.accept().now_or_never() {
        connections.spawn(handler.accept_connection(stream, peer));
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

impl ConnectionHandler {
    /// Registers a connection and returns the future that serves it. Connections are registered in the order in which they
    /// are accepted, because the oldest one is closed first; the runtime starts tasks in any order.
    fn accept_connection(&self, stream: TcpStream, peer: SocketAddr) -> impl Future<Output = ()> + Send + 'static {
        let activity = Arc::new(ConnectionActivity::new());
        let permit = self.limits.register(peer.ip().to_canonical(), Arc::clone(&activity));
        self.clone().accept_tls(stream, peer, activity, permit)
    }

    async fn accept_tls(
        mut self,
        stream: TcpStream,
        peer: SocketAddr,
        activity: Arc<ConnectionActivity>,
        permit: ConnectionPermit,
    ) {
        // A response is one small packet. It must not wait for more data (Nagle's algorithm).
        let _ = stream.set_nodelay(true);
        if permit.in_reserve {
            self.timeouts.head = self.timeouts.head.min(RESERVE_HEAD_TIMEOUT);
        }
        let Some(tls) = self.tls.clone() else { return self.serve_http1(stream, peer, activity, permit).await };
        let handshake = tokio::select! {
            handshake = tokio::time::timeout(self.timeouts.head, tls.accept(stream)) => handshake,
            () = permit.close_requested() => {
                return debug!(%peer, "closed a connection during the TLS handshake to make room for others");
            }
        };
        match handshake {
            Ok(Ok(stream)) => self.serve_http1(stream, peer, activity, permit).await,
            Ok(Err(error)) => debug!(%peer, %error, "the TLS handshake with {peer} failed: {error}"),
            Err(_) => debug!(%peer, "the TLS handshake with {peer} timed out after {} s", self.timeouts.head.as_secs_f32()),
        }
    }

    async fn serve_http1<S>(mut self, stream: S, peer: SocketAddr, activity: Arc<ConnectionActivity>, permit: ConnectionPermit)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let permit = Arc::new(permit);
        let (handler, requests, admission) = (self.clone(), Arc::clone(&activity), Arc::clone(&permit));
        let service = service_fn(move |mut request: Request<Incoming>| {
            let (guard, handler, permit) = (requests.begin_request(), handler.clone(), Arc::clone(&admission));
            request.extensions_mut().insert(PeerIp(peer.ip().to_canonical()));
            Box::pin(async move {
                let mut response = handler.respond(request, &permit).await;
                // Close the keep-alive connection while others wait, or when this replica shuts down.
                if permit.in_reserve || handler.shutdown.announced.is_cancelled() || handler.limits.is_saturated() {
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response.map(|body| MonitoredBody { body, _guard: guard }))
            })
        });
        let io = TokioIo::new(MonitoredIo::new(stream, Arc::clone(&activity)));
        let mut http = http1::Builder::new();
        http.header_read_timeout(None).max_headers(MAX_HEADERS).max_buf_size(MAX_HEAD_BYTES);
        let mut connection = http.serve_connection(io, service);
        let mut draining = false;
        let timed_out = loop {
            tokio::select! {
                // `biased`: read an arrived request before the connection counts as idle or timed out.
                biased;
                ended = &mut connection => {
                    if let Err(error) = ended {
                        debug!(%peer, %error, "the connection with {peer} failed: {error}");
                    }
                    break false;
                }
                () = activity.timed_out(self.timeouts) => break true,
                () = permit.close_requested() => {
                    let is_before_request = matches!(activity.phase(), ConnectionPhase::New | ConnectionPhase::ReadingHead);
                    if activity.may_close() || (permit.in_reserve && is_before_request) {
                        return debug!(%peer, "closed an idle connection to make room for others");
                    }
                }
                () = self.shutdown.stopped.cancelled(), if !draining => {
                    draining = true;
                    self.timeouts.head = self.timeouts.head.min(RESERVE_HEAD_TIMEOUT);
                    // A request that has begun to arrive still gets a response; hyper's graceful shutdown would drop it.
                    if matches!(activity.phase(), ConnectionPhase::Idle | ConnectionPhase::Serving) {
                        std::pin::Pin::new(&mut connection).graceful_shutdown();
                    }
                }
            }
        };
        let io = connection.into_parts().io.into_inner();
        let problem = match (io.suppressed_status(), timed_out.then(|| activity.phase())) {
            (Some(400), _) => Problem::new(ErrorCode::MalformedRequest, "this is not an HTTP/1.1 request"),
            (Some(_), _) => Problem::new(
                ErrorCode::HeadersTooLarge,
                format!("the request has more than {MAX_HEADERS} headers, or more than 16 KiB of them"),
            ),
            (None, Some(ConnectionPhase::ReadingHead)) => {
                let seconds = self.timeouts.head.as_secs_f32();
                Problem::new(ErrorCode::RequestTimeout, format!("the request head did not arrive within {seconds} s"))
            }
            _ => return,
        };
        debug!(%peer, code = %problem.code, "refused an invalid or incomplete request: {}", problem.code);
        io.write_final_response(&final_response(problem, &self.base_path)).await;
    }

    /// Responds to a request, or refuses it if the connection is not admitted.
    async fn respond(&self, mut request: Request<Incoming>, permit: &ConnectionPermit) -> axum::response::Response {
        let is_health_check = matches!(request.uri().path(), "/healthz" | "/readyz");
        if !(permit.in_reserve && is_health_check)
            && let Err(reason) = permit.wait_until_admitted().await
        {
            request.extensions_mut().insert(RefusedRequest(limit_problem(reason)));
        }
        match TowerToHyperService::new(self.router.clone()).call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }
}

fn limit_problem(reason: LimitReached) -> Problem {
    match reason {
        LimitReached::Total => Problem::new(ErrorCode::DependencyUnavailable, "the broker is at its limit of connections; retry"),
        LimitReached::PerAddress(limit) => {
            rate_limited(1, &format!("this address is at its limit of {limit} connections; retry"))
        }
    }
}
