#!/usr/bin/env bash
# System packages that the tests of deploy/ use (Debian, Ubuntu): nginx, docker-compose (the client
# alone, for `config`), shellcheck, and openssl and ssh-keygen, which deploy/certs needs anyway.
set -euo pipefail
wanted=()
command -v nginx > /dev/null || [ -x /usr/sbin/nginx ] || wanted+=(nginx-light)
docker compose version > /dev/null 2>&1 || command -v docker-compose > /dev/null || wanted+=(docker-compose)
command -v shellcheck > /dev/null || wanted+=(shellcheck)
command -v openssl > /dev/null || wanted+=(openssl)
command -v ssh-keygen > /dev/null || wanted+=(openssh-client)
command -v systemd-analyze > /dev/null || wanted+=(systemd)
[ ${#wanted[@]} -gt 0 ] || exit 0
sudo=()
[ "$(id -u)" = 0 ] || sudo=(sudo)
export DEBIAN_FRONTEND=noninteractive
# nginx must not start: RUNLEVEL tells the package's scripts that nothing is to be run.
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" env RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${wanted[@]}" > /dev/null
