//! The configuration through the program: what is accepted, what is said, and with which exit status.

#![allow(clippy::unwrap_used, reason = "clippy sees tests only in the test functions themselves")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// The program with nothing from this environment that could matter to it.
fn pgkeep(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pgkeep"))
        .args(arguments)
        .env_clear()
        .envs(environment.iter().copied())
        .output()
        .expect("the program starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn examples() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config-examples");
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|extension| extension == "json")).collect()
}

/// A copy of `text` whose `{"file": …}` secrets exist, in a folder of its own.
fn written(text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("secret"), "from-a-file\n").unwrap();
    let path = folder.path().join("pghoard.json");
    std::fs::write(&path, text.replace("/run/secrets/pgkeep-password", "secret")).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (folder, path)
}

const SECRETS: [(&str, &str); 3] = [
    ("S3_ACCESS_KEY_ID", "AKIAEXAMPLE"),
    ("S3_SECRET_ACCESS_KEY", "from-a-variable"),
    ("REPORTS_DSN", "host=reports password=in-a-dsn"),
];

#[test]
fn every_example_passes_the_check_and_shows_no_secret() {
    let examples = examples();
    assert!(examples.len() >= 4, "{examples:?}");
    for example in examples {
        let (_folder, path) = written(&std::fs::read_to_string(&example).unwrap());
        let checked = pgkeep(&["--config", &path, "config", "check"], &SECRETS);
        assert_eq!(
            (stdout(&checked).as_str(), checked.status.code()),
            ("ok\n", Some(0)),
            "{example:?}: {checked:?}"
        );
        for arguments in [
            ["config", "show", "--config", &path].as_slice(),
            &["config", "show", "--json", "--config", &path],
        ] {
            let shown = stdout(&pgkeep(arguments, &SECRETS));
            assert!(shown.contains("16000"), "{shown}");
            for secret in ["from-a-file", "from-a-variable", "in-a-dsn"] {
                assert!(!shown.contains(secret), "{example:?}: {shown}");
            }
        }
    }
}

#[test]
fn what_is_shown_is_a_configuration_that_means_the_same() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("config-examples/local.json");
    let first = stdout(&pgkeep(&["config", "show", "--json", "--config", example.to_str().unwrap()], &[]));
    let (_folder, path) = written(&first);
    let second = pgkeep(&["config", "show", "--json", "--config", &path], &[]);
    assert_eq!(first, stdout(&second), "{second:?}");
}

#[test]
fn an_unknown_key_is_told_with_the_nearest_and_fails_the_check_only() {
    let (_folder, path) = written(
        r#"{"http_prot": 17000, "backup_sites": {"a": {"basebackup_mode": "delta", "nodes": ["host=db"],
            "object_storage": {"storage_type": "local", "directory": "/x"}}}}"#,
    );
    let checked = pgkeep(&["config", "check", "--config", &path], &[]);
    assert_eq!(checked.status.code(), Some(2));
    let told = stdout(&checked);
    assert!(told.contains("problem: http_prot: unknown key; did you mean `http_port`?\n"), "{told}");
    assert!(told.contains("note: backup_sites.a.basebackup_mode: without effect; "), "{told}");
    assert!(pgkeep(&["config", "show", "--config", &path], &[]).status.success());

    let json = pgkeep(&["config", "check", "--json", "--config", &path], &[]);
    let json: Value = serde_json::from_str(&stdout(&json)).unwrap();
    assert_eq!(json["ok"], false);
    assert_eq!(json["problems"].as_array().unwrap().len(), 1);
}

#[test]
fn a_problem_names_its_place_in_the_file_and_ends_with_status_2() {
    for (text, expected) in [
        (
            r#"{"backup_sites": {"main": {"nodes": [{"port": "x"}]}}}"#,
            "backup_sites.main.nodes[0].port: expected a port number, found \"x\"",
        ),
        ("{\n  \"http_port\": 1,\n}", "line 3, column 1: trailing comma"),
        (
            r#"{"backup_sites": {"a": {"object_storage": {"storage_type": "local"}}}}"#,
            "backup_sites.a.object_storage.directory: missing",
        ),
        (
            r#"{"webserver_password": {"env": "NOT_THERE"}}"#,
            "webserver_password: environment variable `NOT_THERE` is not set",
        ),
        (
            r#"{"backup_sites": {"a": {"object_storage": {"storage_type": "local", "directory": "/x"},
                "encryption_key_id": "k"}}}"#,
            "backup_sites.a.encryption_key_id: the public part of the encryption key `k` is not configured",
        ),
    ] {
        let (_folder, path) = written(text);
        let output = pgkeep(&["config", "check", "--config", &path], &[]);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(stderr(&output).starts_with(&format!("error: {path}: {expected}")), "{}", stderr(&output));
    }
}

#[test]
fn without_any_configuration_the_next_step_is_told() {
    let output = pgkeep(&["config", "check"], &[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).starts_with("error: no configuration\nhint: "), "{}", stderr(&output));
}

#[test]
fn a_file_that_is_not_there_is_named_with_the_reason() {
    let output = pgkeep(&["config", "check"], &[("PGHOARD_CONFIG", "/nowhere/pghoard.json")]);
    assert_eq!(output.status.code(), Some(2));
    let told = stderr(&output);
    assert!(told.contains("cannot read configuration file `/nowhere/pghoard.json`: No such file"), "{told}");
}

#[test]
fn the_environment_alone_is_a_configuration() {
    let output = pgkeep(
        &["config", "show", "--json"],
        &[
            ("PGKEEP_STORAGE", "s3://bucket/prefix?endpoint=http://127.0.0.1:9000"),
            ("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE"),
            ("AWS_SECRET_ACCESS_KEY", "hunter2"),
            ("AWS_REGION", "eu-north-1"),
            ("PGKEEP_SITE", "orders"),
            ("PGHOST", "db"),
            ("PGPASSWORD", "hunter2"),
            ("PGKEEP_HTTP_PORT", "17000"),
        ],
    );
    assert!(!stdout(&output).contains("hunter2"));
    let shown: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let site = &shown["backup_sites"]["orders"];
    assert_eq!(site["nodes"][0]["connection_string"], "host='db' password='***'");
    assert_eq!(site["nodes"][0]["slot"], "pgkeep_orders");
    assert_eq!(site["object_storage"]["bucket_name"], "bucket");
    assert_eq!(site["object_storage"]["region"], "eu-north-1");
    assert_eq!(site["object_storage"]["port"], 9000);
    assert_eq!(shown["http_port"], 17000);
}

#[test]
fn wrong_usage_is_status_2_and_help_is_status_0() {
    assert_eq!(pgkeep(&["config", "chekc"], &[]).status.code(), Some(2));
    assert_eq!(pgkeep(&["--log-level", "loud", "config", "check"], &[]).status.code(), Some(2));
    let help = pgkeep(&["--help"], &[]);
    assert_eq!(help.status.code(), Some(0));
    assert!(stdout(&help).contains("Examples:"));
}

#[test]
fn the_schema_is_the_published_one() {
    let schema = pgkeep(&["config", "schema"], &[]);
    insta::assert_snapshot!(stdout(&schema));
}
