//! Says in plain words why a connection failed.

use std::error::Error as StdError;
use std::io;

use reqwest::Url;

/// Why a connection failed.
pub(crate) struct Failure {
    /// The reason, with the server's host and port. The rest of the URL is omitted, because it may contain a signature.
    pub(crate) reason: String,
    /// Whether a retry may succeed. It does not help against a wrong scheme or an invalid certificate.
    pub(crate) is_retryable: bool,
}

impl Failure {
    pub(crate) fn of(error: reqwest::Error) -> Self {
        let server = error.url().and_then(address).unwrap_or_else(|| "the server".to_owned());
        let error = error.without_url();
        let causes = error_chain(&error);
        let is_retryable = !is_not_tls(&causes) && !is_not_http(&causes) && !causes.contains("invalid peer certificate");
        Self { reason: reason(&error, &server, &causes), is_retryable }
    }
}

fn reason(error: &reqwest::Error, server: &str, causes: &str) -> String {
    let last_cause = causes.rsplit(": ").next().unwrap_or_default();
    if io_error_kind(error) == Some(io::ErrorKind::ConnectionRefused) {
        format!("{server} refused the connection: no program listens there, or a firewall rejects it")
    } else if causes.contains("dns error") {
        format!("the host name of {server} cannot be resolved: {last_cause}")
    } else if is_not_tls(causes) {
        format!("{server} does not speak TLS: if it is an http server, write http:// instead of https://")
    } else if is_not_http(causes) {
        format!("{server} does not answer in HTTP: if it is an https server, write https:// instead of http://")
    } else if causes.contains("invalid peer certificate") {
        format!("the TLS certificate of {server} is not valid: {last_cause}")
    } else if error.is_timeout() && error.is_connect() {
        format!("{server} did not accept the connection in time")
    } else {
        format!("{server}: {causes}")
    }
}

/// Host and port of a URL.
pub(crate) fn address(url: &Url) -> Option<String> {
    Some(format!("{}:{}", url.host_str()?, url.port_or_known_default()?))
}

/// Whether the server answered the TLS handshake with something else. The text is from rustls.
fn is_not_tls(causes: &str) -> bool {
    causes.contains("InvalidContentType")
}

/// Whether the server answered a request with something that is not HTTP. The text is from hyper.
fn is_not_http(causes: &str) -> bool {
    causes.contains("invalid HTTP version parsed")
}

/// The first error of the operating system in the chain of causes.
fn io_error_kind(error: &dyn StdError) -> Option<io::ErrorKind> {
    let mut cause = error.source();
    while let Some(next) = cause {
        if let Some(error) = next.downcast_ref::<io::Error>() {
            return Some(error.kind());
        }
        cause = next.source();
    }
    None
}

/// An error and its causes as one line.
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut reason = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        reason = format!("{reason}: {next}");
        cause = next.source();
    }
    reason
}
