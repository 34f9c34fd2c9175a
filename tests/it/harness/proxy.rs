//! Two ways to come between the broker and a server: one that knows only connections, one that knows S3's calls.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What becomes of connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// They work.
    Open,
    /// They are cut, and new ones are refused.
    Refused,
    /// They stay, new ones too, and nothing passes any more: neither bytes nor their ends. Those that met it never
    /// work again, as when a firewall forgot them.
    Silent,
}

/// A proxy of connections, on a port of its own.
pub(crate) struct Wire {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
    /// How many connections have met the silence.
    met: watch::Receiver<u32>,
    task: JoinHandle<()>,
}

impl Wire {
    /// Listens, and connects each who comes to `target` (host:port).
    pub(crate) async fn to(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mode, modes) = watch::channel(Mode::Open);
        let (meet, met) = watch::channel(0);
        let task = tokio::spawn(listen(address, Some(listener), target.to_owned(), modes, meet));
        Self { address, mode, met, task }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts what is connected, and lets nobody connect. Returns when that is so.
    pub(crate) async fn refuse(&self) {
        self.mode.send(Mode::Refused).unwrap();
        for _ in 0..100 {
            if TcpStream::connect(self.address).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the proxy goes on listening");
    }

    /// Lets everything hang.
    pub(crate) fn silence(&self) {
        self.mode.send(Mode::Silent).unwrap();
    }

    /// Returns once somebody who connected hears nothing.
    pub(crate) async fn is_met(&self) {
        let mut met = self.met.clone();
        let waiting = tokio::time::timeout(Duration::from_secs(20), met.wait_for(|met| *met > 0));
        waiting.await.expect("somebody connects").expect("the proxy listens");
    }

    /// Works again, for whoever connects from now on.
    pub(crate) async fn restore(&self) {
        self.mode.send(Mode::Open).unwrap();
        for _ in 0..100 {
            if TcpStream::connect(self.address).await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the proxy does not listen again");
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(
    address: SocketAddr,
    mut listener: Option<TcpListener>,
    target: String,
    mut modes: watch::Receiver<Mode>,
    met: watch::Sender<u32>,
) {
    loop {
        let mode = *modes.borrow_and_update();
        match (mode, &listener) {
            (Mode::Refused, _) => {
                listener = None;
                if modes.changed().await.is_err() {
                    return;
                }
            }
            (_, None) => listener = Some(TcpListener::bind(address).await.expect("the port is still free")),
            (_, Some(accepting)) => tokio::select! {
                accepted = accepting.accept() => {
                    let (client, _) = accepted.unwrap();
                    met.send_modify(|met| *met += u32::from(mode == Mode::Silent));
                    tokio::spawn(carry(client, target.clone(), modes.clone()));
                }
                changed = modes.changed() => if changed.is_err() { return },
            },
        }
    }
}

/// Carries one connection until the mode changes for the first time.
async fn carry(client: TcpStream, target: String, mut modes: watch::Receiver<Mode>) {
    let mut mode = *modes.borrow_and_update();
    if mode == Mode::Open {
        let Ok(server) = TcpStream::connect(&target).await else { return };
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        // No half is dropped before the end: dropping it would tell the other side.
        tokio::select! {
            () = async { tokio::join!(pump(&mut from_client, &mut to_server), pump(&mut from_server, &mut to_client)); } => return,
            _ = modes.changed() => mode = *modes.borrow_and_update(),
        }
        if mode != Mode::Refused {
            // Kept, and never looked at again, until everything is cut or the test ends.
            let _ = modes.wait_for(|mode| *mode == Mode::Refused).await;
        }
        drop((from_client, to_client, from_server, to_server));
    } else {
        let _ = modes.wait_for(|mode| *mode == Mode::Refused).await;
        drop(client);
    }
}

async fn pump(from: &mut tokio::net::tcp::OwnedReadHalf, to: &mut tokio::net::tcp::OwnedWriteHalf) {
    let mut piece = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut piece).await {
        if to.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}

/// A call that the broker makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Head,
    Begin,
    ListParts,
    ListUploads,
    Finish,
    Other,
}

impl Call {
    fn of(method: &Method, uri: &Uri) -> Self {
        let query = uri.query().unwrap_or_default();
        match *method {
            Method::HEAD => Self::Head,
            Method::POST if query.contains("uploadId=") => Self::Finish,
            Method::POST if query.contains("uploads") => Self::Begin,
            Method::GET if query.contains("uploadId=") => Self::ListParts,
            Method::GET if query.contains("uploads") => Self::ListUploads,
            _ => Self::Other,
        }
    }
}

/// What goes wrong with one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// S3 does not do it, and answers so: status and error code.
    Instead(u16, &'static str),
    /// S3 does it, and answers as if it had not.
    After(u16, &'static str),
    /// S3 does it, and its answer breaks off.
    Cut,
}

/// An S3 that fails as it is told to, in front of one that works.
pub(crate) struct FaultyS3 {
    address: SocketAddr,
    told: Arc<Told>,
    task: JoinHandle<()>,
}

struct Told {
    target: String,
    http: reqwest::Client,
    script: Mutex<Vec<(Call, Fault)>>,
    /// Whether a copy-source never arrives: a PUT that names one is a PUT like any other.
    is_lax: AtomicBool,
    seen: Mutex<Vec<(Call, Uri)>>,
    /// What HEAD shows of each object besides, as where the bucket sets it.
    shown: Mutex<Vec<(&'static str, String)>>,
    /// Whether the bucket has Object Lock with a default retention of a day.
    is_locked: AtomicBool,
    /// How many DELETEs were refused for it.
    refused_deletes: AtomicUsize,
    /// How far its clock is ahead, in seconds. Where it is, no presigned URL is good.
    clock_ahead_seconds: AtomicI64,
    /// How long each call is held back.
    pause: Mutex<Duration>,
    /// How many calls are under way, and were at most.
    under_way: Mutex<(usize, usize)>,
}

impl FaultyS3 {
    pub(crate) async fn before(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let told = Arc::new(Told {
            target: target.to_owned(),
            http: reqwest::Client::new(),
            script: Mutex::default(),
            seen: Mutex::default(),
            is_lax: AtomicBool::default(),
            shown: Mutex::default(),
            is_locked: AtomicBool::default(),
            refused_deletes: AtomicUsize::default(),
            clock_ahead_seconds: AtomicI64::default(),
            pause: Mutex::default(),
            under_way: Mutex::default(),
        });
        let router = axum::Router::new().fallback(answer).with_state(Arc::clone(&told));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, told, task }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next such call fails so; said twice, the next two.
    pub(crate) fn next(&self, call: Call, fault: Fault) {
        self.told.script.lock().unwrap().push((call, fault));
    }

    /// What was asked for and did not happen yet goes right.
    pub(crate) fn forget(&self) {
        self.told.script.lock().unwrap().clear();
    }

    /// From now on a copy-source that nobody signed is not refused.
    pub(crate) fn accept_copy_sources(&self) {
        self.told.is_lax.store(true, Ordering::SeqCst);
    }

    /// From now on each object shows these headers, and no others of this kind.
    pub(crate) fn show(&self, headers: &[(&'static str, &str)]) {
        *self.told.shown.lock().unwrap() = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    }

    /// From now on nothing can be deleted: each object is retained for a day.
    pub(crate) fn lock_objects(&self) {
        self.told.is_locked.store(true, Ordering::SeqCst);
        let until = aws_sdk_s3::primitives::DateTime::from(std::time::SystemTime::now() + Duration::from_secs(86_400));
        let until = until.fmt(aws_sdk_s3::primitives::DateTimeFormat::DateTime).unwrap();
        self.show(&[("x-amz-object-lock-mode", "COMPLIANCE"), ("x-amz-object-lock-retain-until-date", &until)]);
    }

    /// How many DELETEs were refused because of the lock.
    pub(crate) fn refused_deletes(&self) -> usize {
        self.told.refused_deletes.load(Ordering::SeqCst)
    }

    /// Its clock is ahead of everybody's, and it refuses presigned URLs for it.
    pub(crate) fn set_clock_ahead(&self, seconds: i64) {
        self.told.clock_ahead_seconds.store(seconds, Ordering::SeqCst);
    }

    /// How often the call came.
    pub(crate) fn count(&self, call: Call) -> usize {
        self.told.seen.lock().unwrap().iter().filter(|(seen, _)| *seen == call).count()
    }

    /// How often the call came with this word in its address.
    pub(crate) fn count_of(&self, call: Call, word: &str) -> usize {
        let seen = self.told.seen.lock().unwrap();
        seen.iter().filter(|(seen, uri)| *seen == call && uri.to_string().contains(word)).count()
    }

    /// Every call takes this much longer from now on.
    pub(crate) fn slow_down(&self, pause: Duration) {
        *self.told.pause.lock().unwrap() = pause;
        self.told.under_way.lock().unwrap().1 = 0;
    }

    /// How many calls were under way at most, since it was slowed down.
    pub(crate) fn most_at_once(&self) -> usize {
        self.told.under_way.lock().unwrap().1
    }

    /// Whether everything that was asked for went wrong.
    pub(crate) fn is_done(&self) -> bool {
        self.told.script.lock().unwrap().is_empty()
    }
}

impl Drop for FaultyS3 {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn error(status: u16, code: &str) -> Response {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code><Message>as the test wants</Message></Error>"
    );
    (StatusCode::from_u16(status).unwrap(), [(header::CONTENT_TYPE, "application/xml")], body).into_response()
}

async fn answer(State(told): State<Arc<Told>>, request: Request) -> Response {
    let call = Call::of(request.method(), request.uri());
    told.seen.lock().unwrap().push((call, request.uri().clone()));
    let pause = *told.pause.lock().unwrap();
    if !pause.is_zero() {
        let at_once = |change: fn(usize) -> usize| {
            let mut under_way = told.under_way.lock().unwrap();
            under_way.0 = change(under_way.0);
            under_way.1 = under_way.0.max(under_way.1);
        };
        at_once(|now| now + 1);
        tokio::time::sleep(pause).await;
        at_once(|now| now - 1);
    }
    let ahead = told.clock_ahead_seconds.load(Ordering::SeqCst);
    if ahead != 0 && request.uri().query().unwrap_or_default().contains("X-Amz-Signature=") {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs() as i64 + ahead;
        let date = aws_sdk_s3::primitives::DateTime::from_secs(now).fmt(aws_sdk_s3::primitives::DateTimeFormat::HttpDate);
        let mut refused = error(403, "AccessDenied");
        refused.headers_mut().insert(header::DATE, date.unwrap().parse().unwrap());
        return refused;
    }
    if told.is_locked.load(Ordering::SeqCst) {
        let query = request.uri().query().unwrap_or_default();
        if query.contains("object-lock") {
            let rule = "<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled><Rule><DefaultRetention>\
                        <Mode>COMPLIANCE</Mode><Days>1</Days></DefaultRetention></Rule></ObjectLockConfiguration>";
            return ([(header::CONTENT_TYPE, "application/xml")], rule).into_response();
        }
        if request.method() == Method::DELETE && !query.contains("uploadId=") {
            told.refused_deletes.fetch_add(1, Ordering::SeqCst);
            return error(403, "AccessDenied");
        }
    }
    let fault = {
        let mut script = told.script.lock().unwrap();
        let next = script.iter().position(|(expected, _)| *expected == call);
        next.map(|next| script.remove(next).1)
    };
    match fault {
        None => forward(&told, request).await,
        Some(Fault::Instead(status, code)) => error(status, code),
        Some(Fault::After(status, code)) => {
            assert!(forward(&told, request).await.status().is_success(), "the call was to be done first");
            error(status, code)
        }
        Some(Fault::Cut) => {
            assert!(forward(&told, request).await.status().is_success(), "the call was to be done first");
            let broken = stream::iter([Ok(Bytes::from_static(b"<?xml")), Err(std::io::Error::other("cut"))]);
            ([(header::CONTENT_LENGTH, "1000")], Body::from_stream(broken)).into_response()
        }
    }
}

/// Passes the request on as it is: its signature covers the host it was meant for.
async fn forward(told: &Told, request: Request) -> Response {
    let (mut parts, body) = request.into_parts();
    if told.is_lax.load(Ordering::SeqCst) {
        parts.headers.remove("x-amz-copy-source");
    }
    let url = format!("{}{}", told.target, parts.uri);
    let body = axum::body::to_bytes(body, 64 << 20).await.unwrap();
    let sent = told.http.request(parts.method.clone(), url).headers(parts.headers).body(body).send().await;
    let Ok(answered) = sent else { return StatusCode::BAD_GATEWAY.into_response() };
    let status = answered.status();
    let mut headers: HeaderMap = answered.headers().clone();
    headers.remove(header::TRANSFER_ENCODING);
    headers.remove(header::CONNECTION);
    if parts.method != Method::HEAD {
        headers.remove(header::CONTENT_LENGTH);
    } else if status.is_success() {
        for (name, value) in told.shown.lock().unwrap().iter() {
            headers.insert(*name, value.parse().unwrap());
        }
    }
    let body = answered.bytes().await.unwrap_or_default();
    (status, headers, body).into_response()
}
