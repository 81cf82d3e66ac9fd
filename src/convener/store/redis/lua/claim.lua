#!lua
-- CLAIM: become the owner under a new epoch (core.conversation.claim). Rebuilds a head that was lost.
-- KEYS 1 meta  2 log  3 in  4 seen  5 asks
-- ARGV 1 channel  2 me  3 nonce  4 expected owner  5 expected epoch  6 reason  7 floor  8 user  9 generation
--      10 '1' if the turn acted
-- ->   {'OK', head, inbox, {epoch, seq, event}} | {'OK', head, inbox} (the same claim again)
--    | {'CONFLICT'|'CLOSED', head} | {'NOT_FOUND'}
-- @include now
-- @include head
-- @include tip
-- @include publish
local STRIKE_WINDOW = 600000
local tip_epoch, tip_seq = tip()
local head = read_head()
local inbox = redis.call('XRANGE', KEYS[3], '-', '+')
local rebuilt = not head
if rebuilt then
  if tip_epoch == 0 and tip_seq == 0 then return {'NOT_FOUND'} end
  -- Positions go on where they were, as far as anything remembers them.
  local highest = redis.call('ZREVRANGE', KEYS[4], 0, 0, 'WITHSCORES')[2]
  local last = tonumber(highest or 0)
  local cursor = last
  if #inbox > 0 then
    cursor = tonumber(string.match(inbox[1][1], '^%d+')) - 1
    last = math.max(last, tonumber(string.match(inbox[#inbox][1], '^%d+')))
  end
  local ts = text(now)
  head = {owner = ARGV[4], epoch = ARGV[5], seq = text(tip_seq), batch = '', cursor = text(cursor),
    position = text(last), done = '0', base = '0', status = 'running', nonce = '', updated = ts,
    strikes = '0', struck = '0', strike_at = '0', user = ARGV[8], generation = ARGV[9], created = ts, metadata = '{}',
    halted = '0', asks = text(redis.call('HLEN', KEYS[5])), archived = '0', archived_epoch = '0', manifest = ''}
end
if head.owner == ARGV[2] and head.nonce == ARGV[3] then return {'OK', listed(head), inbox} end
if head.owner ~= ARGV[4] or head.epoch ~= ARGV[5] then return {'CONFLICT', listed(head)} end
if ARGV[9] ~= '' and head.generation ~= ARGV[9] then return {'CONFLICT', listed(head)} end
if head.status ~= 'running' then return {'CLOSED', listed(head)} end

local epoch = text(next_epoch(tonumber(head.epoch), tip_epoch, tonumber(ARGV[7])))
local seq = text(tonumber(head.seq) + 1)
local event = open_event(ARGV[2], ARGV[6], tip_epoch, tip_seq)
redis.call('XADD', KEYS[2], epoch .. '-' .. seq, 'e', event)
-- The stream may remember a higher position than anything else does (a stop's), and would refuse the next ones.
if rebuilt and #inbox == 0 then redis.call('DEL', KEYS[3]) end
head.owner, head.nonce, head.epoch, head.seq, head.batch, head.updated = ARGV[2], ARGV[3], epoch, seq, '', text(now)
local waits = head.asks ~= '0'
for _, entry in ipairs(inbox) do
  for i = 1, #entry[2], 2 do
    waits = waits or (entry[2][i] == 'kind' and entry[2][i + 1] == 'answer')
  end
end
if ARGV[6] == 'takeover' and tonumber(head.cursor) > tonumber(head.done) and (ARGV[10] == '1' or not waits) then
  local turn = tonumber(head.done) + 1
  if tonumber(head.struck) == turn and now - tonumber(head.strike_at) <= STRIKE_WINDOW then
    head.strikes = text(tonumber(head.strikes) + 1)
  else
    head.strikes, head.struck, head.strike_at = '1', text(turn), text(now)
  end
end
write_head(head)
publish_log(ARGV[1], epoch, seq, {event}, 1)
return {'OK', listed(head), inbox, {epoch, seq, event}}
