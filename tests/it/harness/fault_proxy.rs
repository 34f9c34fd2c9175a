//! Two proxies between the broker and a server: one controls connections, the other controls single S3 calls.

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

/// What the proxy does with connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// It forwards bytes in both directions.
    Forwarding,
    /// It closes every connection and refuses new ones.
    Refusing,
    /// It keeps every connection open, also new ones, but forwards no bytes and no close. A connection that stalled
    /// never works again, as when a firewall has dropped its state.
    Stalled,
}

/// A TCP proxy on a port of its own.
pub(crate) struct FaultProxy {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
    /// How many connections were accepted while the proxy stalled.
    stalled: watch::Receiver<u32>,
    task: JoinHandle<()>,
}

impl FaultProxy {
    /// Listens, and forwards each connection to `target` (host:port).
    pub(crate) async fn to(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mode, modes) = watch::channel(Mode::Forwarding);
        let (stalled_sender, stalled) = watch::channel(0);
        let task = tokio::spawn(listen(address, Some(listener), target.to_owned(), modes, stalled_sender));
        Self { address, mode, stalled, task }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes every connection and refuses new ones. Returns once a new connection is refused.
    pub(crate) async fn refuse_connections(&self) {
        self.mode.send(Mode::Refusing).unwrap();
        for _ in 0..2000 {
            if TcpStream::connect(self.address).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the proxy still listens");
    }

    /// Keeps every connection open, but forwards nothing.
    pub(crate) fn stall(&self) {
        self.mode.send(Mode::Stalled).unwrap();
    }

    /// How many connections were accepted while the proxy stalled.
    pub(crate) fn stalled_connections(&self) -> u32 {
        *self.stalled.borrow()
    }

    /// Returns once this many connections were accepted while the proxy stalled.
    pub(crate) async fn wait_for_stalled_connections(&self, count: u32) {
        let mut stalled = self.stalled.clone();
        let waiting = tokio::time::timeout(Duration::from_secs(20), stalled.wait_for(|stalled| *stalled >= count));
        waiting.await.expect("a client connects while the proxy stalls").expect("the proxy listens");
    }

    /// Forwards again, for connections that are made from now on.
    pub(crate) async fn restore(&self) {
        self.mode.send(Mode::Forwarding).unwrap();
        for _ in 0..2000 {
            if TcpStream::connect(self.address).await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the proxy does not listen again");
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(
    address: SocketAddr,
    mut listener: Option<TcpListener>,
    target: String,
    mut modes: watch::Receiver<Mode>,
    stalled: watch::Sender<u32>,
) {
    loop {
        let mode = *modes.borrow_and_update();
        match (mode, &listener) {
            (Mode::Refusing, _) => {
                listener = None;
                if modes.changed().await.is_err() {
                    return;
                }
            }
            (_, None) => listener = Some(TcpListener::bind(address).await.expect("the port is still free")),
            (_, Some(accepting)) => tokio::select! {
                accepted = accepting.accept() => {
                    let (client, _) = accepted.unwrap();
                    stalled.send_modify(|stalled| *stalled += u32::from(mode == Mode::Stalled));
                    tokio::spawn(forward_connection(client, target.clone(), modes.clone()));
                }
                changed = modes.changed() => if changed.is_err() { return },
            },
        }
    }
}

/// Forwards one connection until the mode changes for the first time.
async fn forward_connection(client: TcpStream, target: String, mut modes: watch::Receiver<Mode>) {
    let mut mode = *modes.borrow_and_update();
    if mode == Mode::Forwarding {
        let Ok(server) = TcpStream::connect(&target).await else { return };
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        // Neither half is dropped before the end: a drop would close the other side's connection.
        tokio::select! {
            ((), ()) = async {
                tokio::join!(copy_bytes(&mut from_client, &mut to_server), copy_bytes(&mut from_server, &mut to_client))
            } => return,
            _ = modes.changed() => mode = *modes.borrow_and_update(),
        }
        if mode != Mode::Refusing {
            // Kept open and unread until the proxy refuses connections or the test ends.
            let _ = modes.wait_for(|mode| *mode == Mode::Refusing).await;
        }
        drop((from_client, to_client, from_server, to_server));
    } else {
        let _ = modes.wait_for(|mode| *mode == Mode::Refusing).await;
        drop(client);
    }
}

async fn copy_bytes(from: &mut tokio::net::tcp::OwnedReadHalf, to: &mut tokio::net::tcp::OwnedWriteHalf) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}

/// An S3 call that the broker makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Head,
    CreateMultipart,
    ListParts,
    ListUploads,
    CompleteMultipart,
    Other,
}

impl Call {
    fn of(method: &Method, uri: &Uri) -> Self {
        let query = uri.query().unwrap_or_default();
        match *method {
            Method::HEAD => Self::Head,
            Method::POST if query.contains("uploadId=") => Self::CompleteMultipart,
            Method::POST if query.contains("uploads") => Self::CreateMultipart,
            Method::GET if query.contains("uploadId=") => Self::ListParts,
            Method::GET if query.contains("uploads") => Self::ListUploads,
            _ => Self::Other,
        }
    }
}

/// How one S3 call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// S3 does not execute the call and answers with this status and error code.
    NotExecuted(u16, &'static str),
    /// S3 executes the call, but answers with this status and error code.
    ExecutedThenError(u16, &'static str),
    /// S3 executes the call, and its response breaks off.
    ExecutedThenCut,
}

/// An HTTP proxy in front of a working S3 server that makes chosen calls fail.
pub(crate) struct FaultyS3 {
    address: SocketAddr,
    state: Arc<FaultState>,
    task: JoinHandle<()>,
}

struct FaultState {
    target: String,
    http: reqwest::Client,
    faults: Mutex<Vec<(Call, Fault)>>,
    /// Whether the proxy removes `x-amz-copy-source`, so that a PUT with this header is like any other PUT.
    ignores_copy_source: AtomicBool,
    calls: Mutex<Vec<(Call, Uri)>>,
    /// Headers that HEAD shows for each object in addition, as bucket settings would add them.
    head_headers: Mutex<Vec<(&'static str, String)>>,
    /// Whether the bucket has Object Lock with a default retention of a day.
    has_object_lock: AtomicBool,
    /// How many DELETEs were refused because of Object Lock.
    refused_deletes: AtomicUsize,
    /// How far the server's clock is ahead, in seconds. If it is not 0, no presigned URL is valid.
    clock_ahead_seconds: AtomicI64,
    /// How long each call is delayed. A change ends the delays of the calls in progress.
    delay: watch::Sender<Duration>,
    /// How many calls are in progress now, and the most that were in progress at once.
    calls_in_progress: Mutex<(usize, usize)>,
}

impl FaultyS3 {
    pub(crate) async fn in_front_of(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(FaultState {
            target: target.to_owned(),
            http: reqwest::Client::new(),
            faults: Mutex::default(),
            calls: Mutex::default(),
            ignores_copy_source: AtomicBool::default(),
            head_headers: Mutex::default(),
            has_object_lock: AtomicBool::default(),
            refused_deletes: AtomicUsize::default(),
            clock_ahead_seconds: AtomicI64::default(),
            delay: watch::Sender::default(),
            calls_in_progress: Mutex::default(),
        });
        let router = axum::Router::new().fallback(handle).with_state(Arc::clone(&state));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, state, task }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Makes the next such call fail like this. Called twice, the next two fail.
    pub(crate) fn fail_next(&self, call: Call, fault: Fault) {
        self.state.faults.lock().unwrap().push((call, fault));
    }

    /// Drops the faults that have not happened yet.
    pub(crate) fn clear_faults(&self) {
        self.state.faults.lock().unwrap().clear();
    }

    /// From now on an unsigned copy-source header is ignored instead of refused.
    pub(crate) fn ignore_copy_source_header(&self) {
        self.state.ignores_copy_source.store(true, Ordering::SeqCst);
    }

    /// From now on HEAD shows these headers for each object, and no others of this kind.
    pub(crate) fn show_head_headers(&self, headers: &[(&'static str, &str)]) {
        *self.state.head_headers.lock().unwrap() = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    }

    /// From now on each object is retained for a day, so that S3 refuses every DELETE.
    pub(crate) fn enable_object_lock(&self) {
        self.state.has_object_lock.store(true, Ordering::SeqCst);
        let until = aws_sdk_s3::primitives::DateTime::from(std::time::SystemTime::now() + Duration::from_secs(86_400));
        let until = until.fmt(aws_sdk_s3::primitives::DateTimeFormat::DateTime).unwrap();
        self.show_head_headers(&[("x-amz-object-lock-mode", "COMPLIANCE"), ("x-amz-object-lock-retain-until-date", &until)]);
    }

    /// How many DELETEs were refused because of the lock.
    pub(crate) fn refused_deletes(&self) -> usize {
        self.state.refused_deletes.load(Ordering::SeqCst)
    }

    /// Sets the server's clock ahead of every client's clock, so that it refuses presigned URLs.
    pub(crate) fn set_clock_ahead(&self, seconds: i64) {
        self.state.clock_ahead_seconds.store(seconds, Ordering::SeqCst);
    }

    /// How often this call was made.
    pub(crate) fn count(&self, call: Call) -> usize {
        self.state.calls.lock().unwrap().iter().filter(|(made, _)| *made == call).count()
    }

    /// How often this call was made with this word in its URL.
    pub(crate) fn count_with(&self, call: Call, word: &str) -> usize {
        let calls = self.state.calls.lock().unwrap();
        calls.iter().filter(|(made, uri)| *made == call && uri.to_string().contains(word)).count()
    }

    /// Delays every call by this much from now on. Calls that are delayed now continue at once.
    pub(crate) fn delay_calls(&self, delay: Duration) {
        self.state.calls_in_progress.lock().unwrap().1 = 0;
        self.state.delay.send_replace(delay);
    }

    /// The most calls that were in progress at once since `delay_calls`.
    pub(crate) fn max_concurrent_calls(&self) -> usize {
        self.state.calls_in_progress.lock().unwrap().1
    }

    /// Whether every requested fault has happened.
    pub(crate) fn all_faults_happened(&self) -> bool {
        self.state.faults.lock().unwrap().is_empty()
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

async fn handle(State(state): State<Arc<FaultState>>, request: Request) -> Response {
    let call = Call::of(request.method(), request.uri());
    state.calls.lock().unwrap().push((call, request.uri().clone()));
    let mut delays = state.delay.subscribe();
    let delay = *delays.borrow_and_update();
    if !delay.is_zero() {
        let at_once = |change: fn(usize) -> usize| {
            let mut calls_in_progress = state.calls_in_progress.lock().unwrap();
            calls_in_progress.0 = change(calls_in_progress.0);
            calls_in_progress.1 = calls_in_progress.0.max(calls_in_progress.1);
        };
        at_once(|now| now + 1);
        let _ = tokio::time::timeout(delay, delays.changed()).await;
        at_once(|now| now - 1);
    }
    let ahead = state.clock_ahead_seconds.load(Ordering::SeqCst);
    if ahead != 0 && request.uri().query().unwrap_or_default().contains("X-Amz-Signature=") {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs() as i64 + ahead;
        let date = aws_sdk_s3::primitives::DateTime::from_secs(now).fmt(aws_sdk_s3::primitives::DateTimeFormat::HttpDate);
        let mut refused = error(403, "AccessDenied");
        refused.headers_mut().insert(header::DATE, date.unwrap().parse().unwrap());
        return refused;
    }
    if state.has_object_lock.load(Ordering::SeqCst) {
        let query = request.uri().query().unwrap_or_default();
        if query.contains("object-lock") {
            let rule = "<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled><Rule><DefaultRetention>\
                        <Mode>COMPLIANCE</Mode><Days>1</Days></DefaultRetention></Rule></ObjectLockConfiguration>";
            return ([(header::CONTENT_TYPE, "application/xml")], rule).into_response();
        }
        if request.method() == Method::DELETE && !query.contains("uploadId=") {
            state.refused_deletes.fetch_add(1, Ordering::SeqCst);
            return error(403, "AccessDenied");
        }
    }
    let fault = {
        let mut faults = state.faults.lock().unwrap();
        let next = faults.iter().position(|(expected, _)| *expected == call);
        next.map(|next| faults.remove(next).1)
    };
    match fault {
        None => forward(&state, request).await,
        Some(Fault::NotExecuted(status, code)) => error(status, code),
        Some(Fault::ExecutedThenError(status, code)) => {
            assert!(forward(&state, request).await.status().is_success(), "S3 executes the call before it fails");
            error(status, code)
        }
        Some(Fault::ExecutedThenCut) => {
            assert!(forward(&state, request).await.status().is_success(), "S3 executes the call before it fails");
            let broken = stream::iter([Ok(Bytes::from_static(b"<?xml")), Err(std::io::Error::other("cut"))]);
            ([(header::CONTENT_LENGTH, "1000")], Body::from_stream(broken)).into_response()
        }
    }
}

/// Forwards the request unchanged: its signature covers the host that it was signed for.
async fn forward(state: &FaultState, request: Request) -> Response {
    let (mut parts, body) = request.into_parts();
    if state.ignores_copy_source.load(Ordering::SeqCst) {
        parts.headers.remove("x-amz-copy-source");
    }
    let url = format!("{}{}", state.target, parts.uri);
    let body = axum::body::to_bytes(body, 64 << 20).await.unwrap();
    let sent = state.http.request(parts.method.clone(), url).headers(parts.headers).body(body).send().await;
    let Ok(answered) = sent else { return StatusCode::BAD_GATEWAY.into_response() };
    let status = answered.status();
    let mut headers: HeaderMap = answered.headers().clone();
    headers.remove(header::TRANSFER_ENCODING);
    headers.remove(header::CONNECTION);
    if parts.method != Method::HEAD {
        headers.remove(header::CONTENT_LENGTH);
    } else if status.is_success() {
        for (name, value) in state.head_headers.lock().unwrap().iter() {
            headers.insert(*name, value.parse().unwrap());
        }
    }
    let body = answered.bytes().await.unwrap_or_default();
    (status, headers, body).into_response()
}
