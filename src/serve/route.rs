//! What a request asks for.
//!
//! Pure. A path is taken apart strictly: what is not exactly a known route is refused with 400, never
//! with 404, because 404 has one meaning here — storage says that the file does not exist — and ends a
//! recovery.

use std::path::PathBuf;

use hyper::header::HeaderMap;
use hyper::{Method, StatusCode};

use crate::postgres::WalFileName;

/// PGHoard's header: write the file there instead of sending it.
pub const TARGET_PATH_HEADER: &str = "x-pghoard-target-path";

/// A path longer than this is no route: the longest file name has 40 characters, a site's name fewer than
/// the 255 a file system allows, each of which may be written as three.
const LONGEST_PATH: usize = 1024;

/// One request, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Send a file, or write it to `target` on this machine.
    Fetch {
        site: SiteChoice,
        file: WalFileName,
        target: Option<PathBuf>,
    },
    /// Say whether a file is there.
    Probe {
        site: SiteChoice,
        file: WalFileName,
    },
    /// Store a file.
    Archive {
        site: SiteChoice,
        file: WalFileName,
    },
    /// Name the base backups there are.
    ListBackups {
        site: SiteChoice,
    },
    /// Have a base backup taken soon.
    RequestBackup {
        site: SiteChoice,
    },
    /// PGHoard's page about one site, which it never had.
    SiteStatus {
        site: SiteChoice,
    },
    Status,
    Metrics,
    Health,
    Ready,
    Home,
}

/// Which site a request is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SiteChoice {
    /// `-`: the only one there is.
    Only,
    Named(String),
}

/// A request that is not understood, as it is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub status: StatusCode,
    pub reason: String,
}

impl Refusal {
    pub(super) fn bad_request(reason: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, reason: reason.into() }
    }
}

/// Methods a route knows, for the `Allow` header of a 405 answer.
pub const ALLOWED: &str = "GET, HEAD, PUT";

/// Reads a request's method, path (without query) and headers.
pub fn route(method: &Method, path: &str, headers: &HeaderMap) -> Result<Route, Refusal> {
    if ![Method::GET, Method::HEAD, Method::PUT].contains(method) {
        return Err(Refusal {
            status: StatusCode::METHOD_NOT_ALLOWED,
            reason: format!("method not allowed; use one of {ALLOWED}"),
        });
    }
    if path.len() > LONGEST_PATH {
        return Err(Refusal::bad_request("path is too long"));
    }
    let segments = path_segments(path)?;
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    match (method, segments.as_slice()) {
        (&Method::PUT, [site, "basebackup", ..] | [site, "archive", "basebackup"]) => {
            Ok(Route::RequestBackup { site: site_choice(site) })
        }
        (_, [site, "basebackup", ..] | [site, "archive", "basebackup"]) => {
            Ok(Route::ListBackups { site: site_choice(site) })
        }
        (&Method::GET, [site, "status"]) => Ok(Route::SiteStatus { site: site_choice(site) }),
        (&Method::PUT, [site, kind, name]) => {
            refuse_target(headers)?;
            Ok(Route::Archive { site: site_choice(site), file: file(kind, name)? })
        }
        (&Method::HEAD, [site, kind, name]) => {
            refuse_target(headers)?;
            Ok(Route::Probe { site: site_choice(site), file: file(kind, name)? })
        }
        (_, [site, kind, name]) => {
            Ok(Route::Fetch { site: site_choice(site), file: file(kind, name)?, target: target(headers)? })
        }
        (&Method::PUT, _) => Err(no_route()),
        (_, []) => Ok(Route::Home),
        (_, ["status"]) => Ok(Route::Status),
        (_, ["metrics"]) => Ok(Route::Metrics),
        (_, ["healthz"]) => Ok(Route::Health),
        (_, ["readyz"]) => Ok(Route::Ready),
        _ => Err(no_route()),
    }
}

fn no_route() -> Refusal {
    Refusal::bad_request("no such route; WAL files are at `/<site>/archive/<file>`")
}

fn path_segments(path: &str) -> Result<Vec<String>, Refusal> {
    let rest = path.strip_prefix('/').ok_or_else(|| Refusal::bad_request("path does not begin with `/`"))?;
    if rest.is_empty() {
        return Ok(Vec::new());
    }
    rest.split('/')
        .map(|segment| percent_decode(segment).ok_or_else(|| Refusal::bad_request("malformed path")))
        .collect()
}

/// One path segment in plain text; `None` for anything that could mean another path to someone.
fn percent_decode(segment: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(segment.len());
    let mut rest = segment.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        match byte {
            b'%' => {
                let (digits, tail) = rest.split_first_chunk::<2>()?;
                let digit = |byte: u8| char::from(byte).to_digit(16);
                let value = digit(digits[0])? * 16 + digit(digits[1])?;
                decoded.push(u8::try_from(value).ok()?);
                rest = tail;
            }
            b'!'..=b'~' => decoded.push(byte),
            _ => return None,
        }
    }
    let text = String::from_utf8(decoded).ok()?;
    let odd = text.is_empty() || text == "." || text == ".." || text.contains(['/', '\\']);
    (!odd && !text.chars().any(char::is_control)).then_some(text)
}

fn site_choice(name: &str) -> SiteChoice {
    if name == "-" { SiteChoice::Only } else { SiteChoice::Named(name.to_owned()) }
}

fn file(kind: &str, name: &str) -> Result<WalFileName, Refusal> {
    let file: WalFileName = name.parse().map_err(|error| Refusal::bad_request(format!("{error}")))?;
    let fits = match kind {
        "archive" => true,
        "xlog" => !matches!(file, WalFileName::History(_)),
        "timeline" => matches!(file, WalFileName::History(_)),
        _ => return Err(no_route()),
    };
    if fits {
        Ok(file)
    } else {
        Err(Refusal::bad_request(format!("`{file}` does not belong under `{kind}`")))
    }
}

fn target(headers: &HeaderMap) -> Result<Option<PathBuf>, Refusal> {
    let mut values = headers.get_all(TARGET_PATH_HEADER).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let path = value.to_str().ok().map(PathBuf::from).filter(|path| path.is_absolute());
    match (path, values.next()) {
        (Some(path), None) => Ok(Some(path)),
        _ => Err(Refusal::bad_request(format!("`{TARGET_PATH_HEADER}` must be one absolute path"))),
    }
}

fn refuse_target(headers: &HeaderMap) -> Result<(), Refusal> {
    if headers.contains_key(TARGET_PATH_HEADER) {
        return Err(Refusal::bad_request(format!("`{TARGET_PATH_HEADER}` goes with GET only")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SEGMENT: &str = "000000010000000000000003";

    fn get(path: &str) -> Result<Route, Refusal> {
        route(&Method::GET, path, &HeaderMap::new())
    }

    #[test]
    fn finds_a_file_under_each_of_its_paths() {
        let file = |name: &str| name.parse::<WalFileName>().unwrap();
        let site = SiteChoice::Named("main".to_owned());
        for (path, name) in [
            ("/main/archive/000000010000000000000003", SEGMENT),
            ("/main/xlog/000000010000000000000003", SEGMENT),
            ("/m%61in/archive/000000010000000000000003.partial", "000000010000000000000003.partial"),
            ("/main/timeline/00000002.history", "00000002.history"),
        ] {
            let expected = Route::Fetch { site: site.clone(), file: file(name), target: None };
            assert_eq!(get(path).unwrap(), expected, "{path}");
        }
        assert_eq!(
            route(&Method::HEAD, "/-/archive/00000002.history", &HeaderMap::new()).unwrap(),
            Route::Probe { site: SiteChoice::Only, file: file("00000002.history") }
        );
        assert_eq!(
            route(&Method::PUT, &format!("/main/archive/{SEGMENT}"), &HeaderMap::new()).unwrap(),
            Route::Archive { site, file: file(SEGMENT) }
        );
    }

    #[test]
    fn knows_the_pages_of_its_own() {
        assert_eq!(get("/").unwrap(), Route::Home);
        assert_eq!(get("/status").unwrap(), Route::Status);
        assert_eq!(get("/healthz").unwrap(), Route::Health);
        assert_eq!(get("/readyz").unwrap(), Route::Ready);
    }

    #[test]
    fn knows_pghoards_pages_about_base_backups() {
        let site = || SiteChoice::Named("main".to_owned());
        let put = |path: &str| route(&Method::PUT, path, &HeaderMap::new());
        for path in ["/main/basebackup", "/main/basebackup/whatever", "/main/archive/basebackup"] {
            assert_eq!(get(path).unwrap(), Route::ListBackups { site: site() }, "{path}");
            assert_eq!(put(path).unwrap(), Route::RequestBackup { site: site() }, "{path}");
        }
        assert_eq!(get("/main/status").unwrap(), Route::SiteStatus { site: site() });
        assert!(put("/main/status").is_err());
    }

    #[test]
    fn nothing_but_a_route_is_understood_and_nothing_is_404() {
        for path in [
            "",
            "main",
            "//",
            "/main",
            "/main/archive",
            "/main/archive/",
            "/main/archive/basebackup2",
            "/main/archive/000000010000000000000003/",
            "/main/archive/../archive/000000010000000000000003",
            "/main/archive/%2e%2e",
            "/main/archive/..%2f000000010000000000000003",
            "/main%2farchive/000000010000000000000003",
            "/main%00/archive/000000010000000000000003",
            "/main/archive/000000010000000000000003%00",
            "/main/archive/000000010000000000000003%",
            "/main/archive/000000010000000000000003%0",
            "/main/archive/00000001000000000000000%zz",
            "/main/archive/00000001000000000000000a",
            "/%ff/archive/000000010000000000000003",
            "/../archive/000000010000000000000003",
            "/main\\x/archive/000000010000000000000003",
            "/main/xlog/00000002.history",
            "/main/timeline/000000010000000000000003",
            "/main/elsewhere/000000010000000000000003",
        ] {
            assert_eq!(get(path).unwrap_err().status, StatusCode::BAD_REQUEST, "{path}");
        }
        let long = format!("/{}/archive/{SEGMENT}", "x".repeat(2000));
        assert_eq!(get(&long).unwrap_err().status, StatusCode::BAD_REQUEST);
        let refused =
            route(&Method::DELETE, "/main/archive/00000002.history", &HeaderMap::new()).unwrap_err();
        assert_eq!(refused.status, StatusCode::METHOD_NOT_ALLOWED);
    }

    #[test]
    fn a_target_is_one_absolute_path_and_goes_with_get() {
        let path = format!("/main/archive/{SEGMENT}");
        let mut headers = HeaderMap::new();
        headers.insert(TARGET_PATH_HEADER, "/data/pg_wal/RECOVERYXLOG".parse().unwrap());
        let Route::Fetch { target: Some(target), .. } = route(&Method::GET, &path, &headers).unwrap() else {
            panic!("a fetch with a target");
        };
        assert_eq!(target, PathBuf::from("/data/pg_wal/RECOVERYXLOG"));
        for method in [Method::PUT, Method::HEAD] {
            assert!(route(&method, &path, &headers).is_err());
        }
        headers.append(TARGET_PATH_HEADER, "/data/other".parse().unwrap());
        assert!(route(&Method::GET, &path, &headers).is_err());
        headers.insert(TARGET_PATH_HEADER, "pg_wal/RECOVERYXLOG".parse().unwrap());
        assert!(route(&Method::GET, &path, &headers).is_err());
    }

    proptest! {
        #[test]
        fn any_path_is_understood_or_refused(path in "\\PC{0,80}", method in 0_usize..3) {
            let method = &[Method::GET, Method::HEAD, Method::PUT][method];
            if let Err(refusal) = route(method, &path, &HeaderMap::new()) {
                prop_assert_eq!(refusal.status, StatusCode::BAD_REQUEST);
            }
        }

        #[test]
        fn a_site_name_survives_percent_encoding(name in "[^/\\\\\\p{Cc}]{1,40}") {
            prop_assume!(name != "." && name != ".." && name != "-");
            let encoded: Vec<String> = name.bytes().map(|byte| format!("%{byte:02X}")).collect();
            let encoded = encoded.concat();
            let path = format!("/{encoded}/archive/{SEGMENT}");
            prop_assume!(path.len() <= LONGEST_PATH);
            let Route::Fetch { site, .. } = get(&path).unwrap() else { panic!("a fetch") };
            prop_assert_eq!(site, SiteChoice::Named(name));
        }
    }
}
