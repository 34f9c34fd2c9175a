//! Serving: connections in, each with its limits, none more than there are seats.
//!
//! The door speaks HTTP/1.1 alone. No bytes of an upload pass it, so streams of HTTP/2 would save nothing, and a
//! connection is one request at a time: the bound on connections is the bound on requests.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::header::{CONNECTION, HeaderValue};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use lfs_broker_client::api::ErrorCode;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::Settings;
use super::edge::last_answer;
use super::problem::Problem;
use super::tls::Tls;
use super::wire::{Answer, Limits, Phase, Pulse, Wire};

/// The largest head that is parsed; what is above 16 KiB is refused after, by name.
const HEAD_BYTES: usize = 64 << 10;
/// Most headers of a request.
const HEADERS: usize = 100;
/// How long to wait when the system has no more sockets.
const PAUSE: Duration = Duration::from_millis(200);

/// Who is at the other end of the connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(pub(super) IpAddr);

/// What every connection needs.
#[derive(Clone)]
struct Door {
    router: Router,
    /// Base of what is linked to in answers.
    base_path: Arc<str>,
    tls: Option<Tls>,
    limits: Limits,
    /// Whether others wait for a seat.
    crowded: Arc<AtomicBool>,
    stopped: watch::Receiver<bool>,
}

/// Serves until the end is asked for, and then what is under way. Dropped, it drops every connection.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    base_path: String,
    tls: Option<Tls>,
    settings: Settings,
    mut stopped: watch::Receiver<bool>,
) {
    let limits = Limits { head: settings.header_time, idle: settings.idle_time, write: settings.write_time };
    let (seats, crowded) = (Arc::new(Semaphore::new(settings.connections)), Arc::new(AtomicBool::new(false)));
    let door = Door { router, base_path: base_path.into(), tls, limits, crowded: Arc::clone(&crowded), stopped: stopped.clone() };
    let mut guests = JoinSet::new();
    loop {
        // A set keeps what has ended until somebody looks.
        while guests.try_join_next().is_some() {}
        // The seat comes first: without one the client waits in the system's queue, and costs nothing here.
        let next = async {
            crowded.store(seats.available_permits() == 0, Ordering::Relaxed);
            let seat = Arc::clone(&seats).acquire_owned().await.expect("nobody closes the seats");
            crowded.store(false, Ordering::Relaxed);
            listener.accept().await.map(|(stream, peer)| (stream, peer, seat))
        };
        let next = tokio::select! {
            next = next => next,
            _ = stopped.wait_for(|stopped| *stopped) => break,
        };
        match next {
            Ok((stream, peer, seat)) => {
                let door = door.clone();
                guests.spawn(async move {
                    door.receive(stream, peer).await;
                    drop(seat);
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    drop(listener);
    while guests.join_next().await.is_some() {}
}

impl Door {
    async fn receive(self, stream: TcpStream, peer: SocketAddr) {
        // An answer is one small packet: it is not held back for another.
        let _ = stream.set_nodelay(true);
        let Some(tls) = self.tls.clone() else { return self.converse(stream, peer).await };
        match tokio::time::timeout(self.limits.head, tls.accept(stream)).await {
            Ok(Ok(stream)) => self.converse(stream, peer).await,
            Ok(Err(error)) => debug!(%peer, %error, "a TLS handshake failed"),
            Err(_) => debug!(%peer, "a TLS handshake took too long"),
        }
    }

    async fn converse<S: AsyncRead + AsyncWrite + Unpin>(mut self, stream: S, peer: SocketAddr) {
        let pulse = Arc::new(Pulse::new());
        let (router, crowded, served) = (TowerToHyperService::new(self.router), self.crowded, Arc::clone(&pulse));
        let service = service_fn(move |mut request: Request<Incoming>| {
            let (serving, crowded) = (served.serve(), Arc::clone(&crowded));
            request.extensions_mut().insert(Peer(peer.ip().to_canonical()));
            let answering = router.call(request);
            Box::pin(async move {
                let mut response = match answering.await {
                    Ok(response) => response,
                    Err(never) => match never {},
                };
                if crowded.load(Ordering::Relaxed) {
                    // Whoever was served comes again behind those who wait.
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response.map(|body| Answer { body, _serving: serving }))
            })
        });
        let wire = TokioIo::new(Wire::new(stream, Arc::clone(&pulse)));
        let mut http = http1::Builder::new();
        http.header_read_timeout(None).max_headers(HEADERS).max_buf_size(HEAD_BYTES);
        let mut connection = http.serve_connection(wire, service);
        let mut leaving = false;
        let overdue = loop {
            tokio::select! {
                ended = &mut connection => {
                    if let Err(error) = ended {
                        debug!(%peer, %error, "a connection ended badly");
                    }
                    break false;
                }
                () = pulse.overdue(self.limits) => break true,
                _ = self.stopped.wait_for(|stopped| *stopped), if !leaving => {
                    leaving = true;
                    std::pin::Pin::new(&mut connection).graceful_shutdown();
                }
            }
        };
        let wire = connection.into_parts().io.into_inner();
        let problem = match (wire.kept_back(), overdue.then(|| pulse.phase())) {
            (Some(400), _) => Problem::new(ErrorCode::MalformedRequest, "this is not a request of HTTP/1.1"),
            (Some(_), _) => Problem::new(
                ErrorCode::HeadersTooLarge,
                format!("the request has more than {HEADERS} headers, or more than 16 KiB of them"),
            ),
            (None, Some(Phase::Head)) => {
                let seconds = self.limits.head.as_secs_f32();
                Problem::new(ErrorCode::RequestTimeout, format!("the request's head did not arrive within {seconds} s"))
            }
            _ => return,
        };
        debug!(%peer, code = %problem.code, "refused what was not a request");
        wire.last_word(&last_answer(problem, &self.base_path)).await;
    }
}
