//! Serving: accepts connections up to a limit, each with its own timeouts.
//!
//! Beyond the limit a small reserve of connections is accepted, which may ask for the broker's health only. The server
//! speaks HTTP/1.1 alone: no bytes of an upload pass through it, so HTTP/2 would save nothing, and a connection carries
//! one request at a time. The limit of connections is therefore the limit of requests.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
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

use super::edge::{Refused, last_answer};
use super::problem::Problem;
use super::seats::{NoSeat, Place, RESERVE, Seats};
use super::tls::Tls;
use super::wire::{Answer, Limits, Phase, Pulse, Wire};
use super::{Ending, Settings, limited};

/// The largest head that is parsed, and so much of a body is read ahead of whoever takes it: each connection may hold it.
/// What is above 16 KiB is refused after, by name.
const HEAD_BYTES: usize = 32 << 10;
/// Most headers of a request.
const HEADERS: usize = 100;
/// How long to wait when the system has no more sockets.
const PAUSE: Duration = Duration::from_millis(200);
/// How long a head may take on a connection without a seat: it holds what health checks need.
const STANDING_HEAD: Duration = Duration::from_secs(2);

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
    seats: Arc<Seats>,
    ending: Ending,
}

/// Serves until the end is asked for, and then what is under way. Dropped, it drops every connection.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    base_path: String,
    tls: Option<Tls>,
    settings: Settings,
    ending: Ending,
) {
    let limits = Limits { head: settings.header_time, idle: settings.idle_time, write: settings.write_time };
    let room = Arc::new(Semaphore::new(settings.connections + RESERVE));
    let seats = Arc::new(Seats::new(settings.connections, settings.connections_per_address, settings.trusted_proxies));
    let mut stopped = ending.stopped.clone();
    let door = Door { router, base_path: base_path.into(), tls, limits, seats, ending };
    let mut guests = JoinSet::new();
    loop {
        // A set keeps what has ended until somebody looks.
        while guests.try_join_next().is_some() {}
        // Without room the client waits in the system's queue, and costs nothing here.
        let next = async {
            let room = Arc::clone(&room).acquire_owned().await.expect("nobody closes it");
            listener.accept().await.map(|(stream, peer)| (stream, peer, room))
        };
        let next = tokio::select! {
            next = next => next,
            _ = stopped.wait_for(|stopped| *stopped) => break,
        };
        match next {
            Ok((stream, peer, room)) => {
                let receiving = door.receive(stream, peer);
                guests.spawn(async move {
                    receiving.await;
                    drop(room);
                });
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
    // What the system has taken in already is served: closing the listener would reset it.
    tokio::task::yield_now().await;
    while let Some(Ok((stream, peer))) = listener.accept().now_or_never() {
        guests.spawn(door.receive(stream, peer));
    }
    drop(listener);
    while guests.join_next().await.is_some() {}
}

impl Door {
    /// Registers a connection and returns the future that serves it. Connections are registered in the order in which they
    /// are accepted, because the oldest one is closed first; the runtime starts tasks in any order.
    fn receive(&self, stream: TcpStream, peer: SocketAddr) -> impl Future<Output = ()> + Send + 'static {
        let pulse = Arc::new(Pulse::new());
        let place = self.seats.enter(peer.ip().to_canonical(), Arc::clone(&pulse));
        self.clone().shake_hands(stream, peer, pulse, place)
    }

    async fn shake_hands(mut self, stream: TcpStream, peer: SocketAddr, pulse: Arc<Pulse>, place: Place) {
        // An answer is one small packet: it is not held back for another.
        let _ = stream.set_nodelay(true);
        if place.is_late {
            self.limits.head = self.limits.head.min(STANDING_HEAD);
        }
        let Some(tls) = self.tls.clone() else { return self.converse(stream, peer, pulse, place).await };
        let handshake = tokio::select! {
            handshake = tokio::time::timeout(self.limits.head, tls.accept(stream)) => handshake,
            () = place.dismissed() => return debug!(%peer, "closed a TLS handshake: others need its place"),
        };
        match handshake {
            Ok(Ok(stream)) => self.converse(stream, peer, pulse, place).await,
            Ok(Err(error)) => debug!(%peer, %error, "a TLS handshake failed"),
            Err(_) => debug!(%peer, "a TLS handshake took too long"),
        }
    }

    async fn converse<S>(mut self, stream: S, peer: SocketAddr, pulse: Arc<Pulse>, place: Place)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let place = Arc::new(place);
        let (door, served, guest) = (self.clone(), Arc::clone(&pulse), Arc::clone(&place));
        let service = service_fn(move |mut request: Request<Incoming>| {
            let (serving, door, place) = (served.serve(), door.clone(), Arc::clone(&guest));
            request.extensions_mut().insert(Peer(peer.ip().to_canonical()));
            Box::pin(async move {
                let mut response = door.answer(request, &place).await;
                // Whoever was served comes again behind those who wait, and to another replica where this one ends.
                if place.is_late || door.ending.is_near() || door.seats.is_full() {
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
                // First: a request that has arrived is read before its connection is taken for idle or too slow.
                biased;
                ended = &mut connection => {
                    if let Err(error) = ended {
                        debug!(%peer, %error, "a connection ended badly");
                    }
                    break false;
                }
                () = pulse.overdue(self.limits) => break true,
                () = place.dismissed() => {
                    if pulse.may_end() || (place.is_late && matches!(pulse.phase(), Phase::Fresh | Phase::Head)) {
                        return debug!(%peer, "closed an idle connection: others need its place");
                    }
                }
                _ = self.ending.stopped.wait_for(|stopped| *stopped), if !leaving => {
                    leaving = true;
                    self.limits.head = self.limits.head.min(STANDING_HEAD);
                    // A request that has begun to arrive is answered: hyper would take it for none.
                    if matches!(pulse.phase(), Phase::Idle | Phase::Busy) {
                        std::pin::Pin::new(&mut connection).graceful_shutdown();
                    }
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

    /// Answers a request, or says why there is no seat for it.
    async fn answer(&self, mut request: Request<Incoming>, place: &Place) -> axum::response::Response {
        let asks_for_health = matches!(request.uri().path(), "/healthz" | "/readyz");
        if !(place.is_late && asks_for_health)
            && let Err(why) = place.seat().await
        {
            request.extensions_mut().insert(Refused(no_seat(why)));
        }
        match TowerToHyperService::new(self.router.clone()).call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }
}

fn no_seat(why: NoSeat) -> Problem {
    match why {
        NoSeat::Full => Problem::new(ErrorCode::DependencyUnavailable, "the broker has as many connections as it may; ask again"),
        NoSeat::Address(most) => limited(1, &format!("this address has {most} connections, as many as it may")),
    }
}
