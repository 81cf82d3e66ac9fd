#!lua flags=allow-oom
-- ARCHIVED: name the list of what the archive has, and trim the log up to there (core.retention.archived).
-- KEYS 1 meta  2 log
-- ARGV 1 owner  2 epoch  3 epoch of the last entry in the archive  4 its seq
--      5 epoch of the first entry to keep  6 its seq  7 manifest
-- ->   'OK' | 'FENCED' | 'STALE'
local head = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'base', 'archived', 'archived_epoch', 'status')
local closed = head[6] == 'stopped'
if not head[1] or head[1] ~= ARGV[1] or head[2] ~= ARGV[2] or (head[1] == '' and not closed) then return 'FENCED' end
local function has(epoch, seq)
  local id = epoch .. '-' .. seq
  return id ~= '0-0' and #redis.call('XRANGE', KEYS[2], id, id) == 1
end
local upto, mark = tonumber(ARGV[4]), tonumber(head[4] or 0)
if upto < mark then return 'STALE' end
if not (upto == mark and ARGV[3] == (head[5] or '0')) and not has(ARGV[3], ARGV[4]) then return 'STALE' end
redis.call('HSET', KEYS[1], 'archived', ARGV[4], 'archived_epoch', ARGV[3], 'manifest', ARGV[7])
local most = closed and upto or math.min(upto, tonumber(head[3]))
if tonumber(ARGV[6]) - 1 <= most and has(ARGV[5], ARGV[6]) then
  redis.call('XTRIM', KEYS[2], 'MINID', ARGV[5] .. '-' .. ARGV[6])
end
return 'OK'
